"""JSONL: one JSON object a line, UTF-8 (a byte-order mark and CRLF line ends are fine)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlalign.tasks.source import RawRow, Source, take_params

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_jsonl(path: str, params: Mapping[str, Any], split: str) -> Source:
    """A row per non-blank line; a line that is not a JSON object in UTF-8 is a broken row."""
    take_params(path, params)
    return Source(Path(path).stem, _rows(Path(path)))


def _rows(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as lines:  # bytes: only a newline ends a line, and each decodes alone
        yield from read_lines(lines)


def read_lines(lines: Iterable[bytes]) -> Iterator[RawRow]:
    """A row per non-blank line, as `open_jsonl` reads them."""
    index = 0
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield _row(index, f"line {number}", line)
            index += 1


def _row(index: int, place: str, line: bytes) -> RawRow:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RawRow(index, place, None, f"not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return RawRow(index, place, None, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 4300 digits, a deep nesting
        return RawRow(index, place, None, f"not JSON that can be read: {error}")
    if not isinstance(value, dict):
        return RawRow(index, place, None, f"a line is {type(value).__name__}, not a JSON object")
    return RawRow(index, place, value)
