"""The rows that `decode_text` reads, and the records that it wrote before."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rlalign.tasks.jsonl import read_lines
from rlalign.tasks.rows import ANSWER_NAMES
from rlalign.tasks.source import RawRow
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.prompt import PROMPT_KEYS
from rlalign.testtime.result import Result

Record = dict[str, Any]
NEEDED = {"method", *(column.name for column in fields(Result))}  # columns of every record
HEAVY = ("text", "token_ids", "trace")  # columns of a record that no figure needs


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the input; its id is its own, or its place among the lines that are not blank.
    `problem` says why it cannot be used."""

    id: str
    value: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def prompt(self) -> Any:
        return next((self.value[key] for key in PROMPT_KEYS if key in self.value), None)

    @property
    def answer(self) -> Any:
        return next((self.value[name] for name in ANSWER_NAMES if name in self.value), None)


def read_rows(path: Path, num: int | None = None, shard: str = "") -> list[Row]:
    """The rows of a JSONL file, the first `num` of them (None: all), and of those shard "I/N", I
    from 1 to N: shards of one N have no row in common, and together they are all. Raises
    DecodeError for a path that is no file, and for a number or shard out of range."""
    if num is not None and num < 1:
        raise DecodeError(f"num={num}: at least 1 row is needed")
    place, of = parse_shard(shard)
    if not path.is_file():
        raise DecodeError(f"{path} is not a file: give a JSONL file with a prompt a line")
    rows = []
    with path.open("rb") as lines:
        for raw in read_lines(lines):
            if raw.index == num:
                break
            rows.append(_row(raw))
    if not rows:
        raise DecodeError(f"{path} has no rows: give a prompt a line")
    return rows[(place - 1) * len(rows) // of : place * len(rows) // of]


def parse_shard(shard: str) -> tuple[int, int]:
    """I and N of "I/N"; "" is 1/1."""
    first, slash, second = (shard or "1/1").partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise DecodeError(f"shard={shard!r} is not I/N with I from 1 to N, e.g. 1/4")
    return int(first), int(second)


def held_records(path: Path, method: str, resume: bool) -> list[Record]:
    """The records in `path` that are no errors, without their texts. With `resume`, the others and
    a last line that was cut off are taken out of the file, for they are made again.

    Raises DecodeError for a file that is there without `resume`, and for one that holds anything
    else than records of `method`.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    if not resume:
        raise DecodeError(
            f"{path} is there already, and would be lost: choose another output, or go on with it "
            "by --resume"
        )
    kept, records = [], []
    for line, record in read_records(path):
        if record["error"]:
            continue
        if record["method"] != method:
            raise DecodeError(
                f"{path} holds records of {record['method']}, not of {method}: choose another "
                "output"
            )
        kept.append(line)
        records.append(slim(record))
    if sum(map(len, kept)) < path.stat().st_size:
        _replace(path, kept)
    return records


def read_records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Each record with its line; a last line that was not written to its end is left out. Raises
    DecodeError for a line that is no record."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            value = next((row.value for row in read_lines([line])), None)
            if value is None or not set(value) >= NEEDED:
                raise DecodeError(
                    f"{path}, line {number} is no record of rlalign decode: choose another file"
                )
            yield line, dict(value)


def missing(rows: Sequence[Row], records: Sequence[Record]) -> list[Row]:
    """The rows without a record of their id and prompt; of several that are the same as many as
    records are missing."""
    held = Counter(_key(record["id"], record.get("prompt")) for record in records)
    left = []
    for row in rows:
        key = _key(row.id, row.prompt)
        if held[key]:
            held[key] -= 1
        else:
            left.append(row)
    return left


def slim(record: Record) -> Record:
    """A record without what is long."""
    return {name: value for name, value in record.items() if name not in HEAVY}


def dump(record: Record) -> str:
    """A record as a line of JSON, which has no number that is not finite: those become null."""
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(record), allow_nan=False)


def _key(name: str, prompt: Any) -> tuple[str, str]:
    return name, json.dumps(prompt)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _row(raw: RawRow) -> Row:
    index, place = str(raw.index), raw.place
    if raw.value is None:
        return Row(index, {}, f"{place}: {raw.problem}")
    value = dict(raw.value)
    name = value.get("id")
    row = Row(index if name is None else str(name), value)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        readable = row.id.encode(errors="replace").decode()
        return Row(readable, {}, f"{place}: half a character ({error.reason})")
    if row.prompt is None:
        return Row(row.id, {}, f"{place}: none of {', '.join(PROMPT_KEYS)} is in it")
    return row


def _replace(path: Path, lines: Sequence[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
