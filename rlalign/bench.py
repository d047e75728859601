"""Finds and runs the project's benchmarks (benchmarks/*.py) and prints their tables.

A benchmark is a script with `run(quick: bool) -> dict` that returns
`{"name", "machine", "rows": [...], "bars": [{"what", "value", "bar", "holds"}]}`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Group
from rich.table import Table

from rlalign.errors import RlalignError

PARTS = ("method", "part")  # of a row, where there are several
SIDE_BY_SIDE = 6  # sides that fit beside each other on a terminal
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


class BenchError(RlalignError):
    """There is no such benchmark, or its peers are not installed."""


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> ModuleType:
    """The script of benchmark `name`, imported. Raises BenchError for an unknown name or outside a
    source checkout."""
    path = FOLDER / f"{name}.py"
    if name not in names():
        known = ", ".join(names()) or f"none: {FOLDER} is not there, run from a source checkout"
        raise BenchError(f"no benchmark {name!r}; there are: {known}")
    spec = importlib.util.spec_from_file_location(f"rlalign_benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # where a benchmark's parts lie, as if it were run as a script
    spec.loader.exec_module(module)
    return module


def run(name: str, *, quick: bool = False, json_path: Path | None = None) -> dict[str, Any]:
    """Run benchmark `name`; `quick` takes fewer repetitions. The result is also written to
    `json_path`. Raises BenchError as `load`."""
    result = load(name).run(quick=quick)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def render(result: Mapping[str, Any]) -> Group:
    """What was measured, a table for each method and part that the rows tell of, and the bars."""
    tables = []
    for named, rows in groupby(result["rows"], lambda row: [row.get(key) for key in PARTS]):
        title = ", ".join([f"{result['name']} on {result['machine']}", *filter(None, named)])
        tables.append(
            _figures(title, [{k: v for k, v in r.items() if k not in PARTS} for r in rows])
        )
    bars = Table("bar", "value", "wanted", "holds")
    for bar in result["bars"]:
        holds = "[green]yes[/green]" if bar["holds"] else "[red]no[/red]"
        bars.add_row(bar["what"], _text(bar["value"]), _text(bar["bar"]), holds)
    return Group(*tables, bars)


def _figures(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Few sides stand side by side, with their many figures below them; many stand one below the
    other."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[name, *(_text(row.get(name)) for row in rows)] for name in names]
    if len(rows) > SIDE_BY_SIDE:
        lines = [list(line) for line in zip(*lines, strict=True)]
    figures = Table(title=title, show_lines=True, show_header=False)
    for _ in lines[0] if lines else ():
        figures.add_column(overflow="fold")
    for line in lines:
        figures.add_row(*line)
    return figures


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
