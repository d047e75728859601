"""A run as one self-contained HTML page: curves, time split, trees, and every sample with its
reward.

The page (report.html beside this file, with its scripts) draws itself from one JSON object; it
loads nothing from anywhere, so it can be mailed or opened from a disk.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlalign.tracking.rundir import RunDir, RunDirError, write_atomic

T = TypeVar("T")

TEMPLATE = Path(__file__).with_name("report.html")
SCRIPTS = [TEMPLATE.with_name(name) for name in ("report_tree.js", "report_tree_view.js")]
# Together they keep the page near 10 MB; whole steps are left out, evenly.
MAX_SAMPLES = 20_000
MAX_TREE_BYTES = 4_000_000


def write_report(
    run: str | Path, max_samples: int = MAX_SAMPLES, max_tree_bytes: int = MAX_TREE_BYTES
) -> Path:
    """Write `report.html` into run directory `run` and return its path.

    Works on a run that is still going. Raises RunDirError where there is no run.
    """
    run_dir = RunDir(Path(run))
    if not run_dir.config.is_file():
        raise RunDirError(f"{run_dir.path} holds no config.yaml: not a run directory")
    scripts = "\n".join(path.read_text() for path in SCRIPTS)
    page = TEMPLATE.read_text().replace("__TREE_SCRIPTS__", scripts)
    # last, so that nothing is looked for in what the samples contain
    page = page.replace("__DATA__", embed(collect_data(run_dir, max_samples, max_tree_bytes)))
    write_atomic(run_dir.report, page)
    return run_dir.report


def collect_data(
    run_dir: RunDir, max_samples: int, max_tree_bytes: int = MAX_TREE_BYTES
) -> dict[str, Any]:
    """What the page shows. `omitted_steps` and `omitted_tree_steps` count the steps whose samples
    or trees did not fit."""
    files = sorted(run_dir.rollouts.glob("step_*.jsonl"))
    chosen, omitted = _thin(files, max_samples)
    samples = [json.loads(line) for file in chosen for line in file.read_text().splitlines()]
    trees, omitted_tree_steps = _collect_trees(run_dir.path / "trees", max_tree_bytes)
    return {
        "name": run_dir.path.name,
        "config": run_dir.config.read_text(),
        "manifest": _read_json(run_dir.manifest),
        "result": _read_json(run_dir.result),
        "metrics": run_dir.read_metrics(),
        "samples": samples,
        "omitted_steps": omitted,
        "trees": trees,
        "omitted_tree_steps": omitted_tree_steps,
    }


def _thin(files: Sequence[Path], max_samples: int) -> tuple[list[Path], int]:
    """Steps spread evenly over the run whose samples number at most about `max_samples`."""
    if not files:
        return [], 0
    per_step = max(1, sum(1 for _ in files[0].open()))
    chosen = _evenly(files, max(1, max_samples // per_step))
    return chosen, len(files) - len(chosen)


def _collect_trees(folder: Path, max_bytes: int) -> tuple[list[dict[str, Any]], int]:
    """Trees of steps spread evenly over the run whose lines, images included, have at most
    `max_bytes`, and the number of steps left out."""
    files = sorted(folder.glob("step_*.jsonl"))
    sizes = [file.stat().st_size for file in files]
    keep = max(1, min(len(files), max_bytes * len(files) // max(sum(sizes), 1)))
    while keep > 1 and sum(_evenly(sizes, keep)) > max_bytes:
        keep -= 1
    chosen = _evenly(files, keep)
    lines = [line for file in chosen for line in file.read_text().splitlines()]
    totals = itertools.accumulate(len(line) for line in lines)
    fitting = [line for line, total in zip(lines, totals, strict=True) if total <= max_bytes]
    trees = [json.loads(line) for line in fitting or lines[:1]]
    if lines and not fitting:
        _drop_images(trees[0]["nodes"], max_bytes)
    return trees, len(files) - len(chosen)


def _drop_images(nodes: dict[str, Any], max_bytes: int) -> None:
    """Of one tree that is too large, keep as many images as fit: those of leaves come first."""
    inner = set(nodes["parent"])
    images = nodes.get("image") or []
    left = max_bytes
    for node in sorted(range(len(images)), key=lambda node: node in inner):
        left -= len(images[node] or "")
        if left < 0:
            images[node] = None


def _evenly(values: Sequence[T], keep: int) -> list[T]:
    """`keep` of the values, or all if there are fewer: the first, the last and evenly between; the
    last where it is one."""
    if keep >= len(values):
        return list(values)
    last = len(values) - 1
    return [values[last - round(i * last / max(keep - 1, 1))] for i in reversed(range(keep))]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def embed(data: Any) -> str:
    """JSON that is safe inside a <script> element whatever the samples contain."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
