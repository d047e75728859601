"""The records of `rlalign decode METHOD` as one self-contained HTML page: each answer, and how the
search came to it.

The page (text_page.html beside this file, with its scripts) draws itself from one JSON object; it
loads nothing from anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlalign.testtime.decode_rows import Record, read_records
from rlalign.testtime.decode_summary import Summary
from rlalign.testtime.errors import DecodeError
from rlalign.tracking.report import embed
from rlalign.tracking.rundir import write_atomic

TEMPLATE = Path(__file__).with_name("text_page.html")
SCRIPTS = [
    TEMPLATE.with_name(name) for name in ("text_page.js", "text_page_view.js", "text_page_trace.js")
]
MAX_BYTES = 20_000_000  # of records with their searches; as much again of records without


def write_text_page(path: str | Path, max_bytes: int = MAX_BYTES) -> Path:
    """Write the page of the records in a JSONL file beside it, under the same name with `.html`,
    and return its path. Works while the file is still being written.

    Raises DecodeError where there is no file, or one that holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise DecodeError(f"{path} is not a file: give the output of rlalign decode")
    scripts = "\n".join(script.read_text(encoding="utf-8") for script in SCRIPTS)
    page = TEMPLATE.read_text(encoding="utf-8").replace("__SCRIPTS__", scripts)
    # last, so that nothing is looked for in what the records contain
    page = page.replace("__DATA__", embed(collect(path, max_bytes)))
    write_atomic(path.with_suffix(".html"), page)
    return path.with_suffix(".html")


def collect(path: Path, max_bytes: int) -> dict[str, Any]:
    """What the page shows. Once the records have `max_bytes`, those that follow lack their trace
    (`trace` is null); once these have as many, they are left out. Both are counted."""
    summary, shown = Summary(), []
    whole = light = without_trace = omitted = 0
    for line, record in read_records(path):
        summary.add(record)
        shown_record: Record = {k: v for k, v in record.items() if k != "token_ids"}
        trace = len(embed(record["trace"]))
        rest = len(line) - trace
        if whole + len(line) <= max_bytes:
            whole += len(line)
        elif light + rest <= max_bytes:
            light += rest
            without_trace += 1
            shown_record["trace"] = None
        else:
            omitted += 1
            continue
        shown.append(shown_record)
    return {
        "name": path.name,
        "summary": summary.figures(),
        "records": shown,
        "without_trace": without_trace,
        "omitted": omitted,
    }
