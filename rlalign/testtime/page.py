"""A page of drafts and repairs: one HTML file without a script, which loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlalign.tracking.rundir import write_atomic

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of decode.py, and HTML that shows it ("": none)."""

    record: dict[str, Any]
    picture: str


def write_page(path: Path, entries: Sequence[Entry], summary: Sequence[tuple[str, str]]) -> Path:
    """Write the page to `path`, and return it."""
    figures = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in summary
    )
    page = TEMPLATE.read_text(encoding="utf-8").replace("__SUMMARY__", figures)
    # last, so that nothing is looked for in what the records contain
    write_atomic(path, page.replace("__ITEMS__", "\n".join(map(_article, entries))))
    return path


def _article(entry: Entry) -> str:
    record = entry.record
    before, after = record["before"], record["after"]
    state = "safe" if record["is_safe"] else "unsafe"
    alone = f"greedy alone {_score(record['alone'])}; " if record["alone"] else ""
    facts = (
        f"{alone}score {_score(before)} &rarr; {_score(after)}, "
        f"violated units {len(before['violated'])} &rarr; {len(after['violated'])}; "
        f"{record['iterations']} repairs, {record['forwards']} forwards, "
        f"{record['scorer_calls']} sequences judged; stopped: {html.escape(record['stop'])}"
    )
    edits = "".join(f"<li>{html.escape(json.dumps(edit))}</li>" for edit in record["edits"])
    trace = f"<details><summary>edits</summary><ol>{edits}</ol></details>" if edits else ""
    return (
        f'<article class="{state}"><h2>{html.escape(record["id"])} '
        f'<span class="state">{state}</span></h2>{entry.picture}<p>{facts}</p>{trace}</article>'
    )


def _score(rating: dict[str, Any]) -> str:
    return "not a number" if rating["score"] is None else f"{rating['score']:.3f}"
