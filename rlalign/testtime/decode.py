"""`rlalign decode reflect` as a function: problems of a domain in, one record each out."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rlalign.models.building import Progress
from rlalign.tasks.errors import TaskError
from rlalign.tasks.jsonl import read_lines
from rlalign.testtime.domain import Domain, Item, open_domain
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.page import Entry, write_page
from rlalign.testtime.rating import Rating
from rlalign.testtime.reflect import ReflectResult
from rlalign.testtime.repair import Edit
from rlalign.tracking.rundir import write_atomic

NUM_ITEMS = 20
BATCH = 16  # problems that share forward passes
MAX_PICTURES = 100  # of a page
RECORDS, PAGE = "results.jsonl", "index.html"

Record = dict[str, Any]


@dataclass
class Summary:
    """What came out of a run. `skipped` says of each line left out why."""

    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    page: Path | None = None

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, for a table."""
        num = len(self.records)
        rows = [("problems", f"{num}"), ("lines skipped", f"{len(self.skipped)}")]
        if not num:
            return rows
        rows.append(("hard, mean", self._change("hard")))
        rows.append(("score, mean", self._change("score")))
        if all(record["alone"] for record in self.records):
            rows.append(
                ("score of the greedy sequence, mean", f"{self._mean('alone', 'score'):.3f}")
            )
        rows.append(("safe", self._change("is_safe")))
        for name in self.records[0]["measured"]["before"]:
            before, after = (self._mean("measured", when, name) for when in ("before", "after"))
            rows.append((f"{name}, mean", f"{before:.3f} -> {after:.3f}"))
        for name in ("iterations", "forwards", "row_forwards", "scorer_calls"):
            rows.append((f"{name}, mean", f"{self._mean(name):.1f}"))
        stops = Counter(record["stop"] for record in self.records)
        rows.append(("stopped", ", ".join(f"{name} {n}" for name, n in stops.most_common())))
        num_bad = sum(record["bad_scores"] for record in self.records)
        rows.append(("scores that were not numbers", f"{num_bad}"))
        rows.append(("time", f"{self.wall_s:.1f} s, {1000 * self.wall_s / num:.0f} ms each"))
        return rows

    def _change(self, name: str) -> str:
        return f"{self._mean('before', name):.3f} -> {self._mean('after', name):.3f}"

    def _mean(self, *path: str) -> float:
        """Over the records; a score that was no number makes it -inf."""
        total = 0.0
        for record in self.records:
            value: Any = record
            for name in path:
                value = value[name]
            total += -math.inf if value is None else float(value)
        return total / len(self.records)


def decode_reflect(
    domain: str | Domain,
    overrides: Sequence[str] = (),
    *,
    num: int | None = None,
    source: str | Path | None = None,
    out: str | Path | None = None,
    skip_bad: bool = False,
    resume: bool = False,
    on_record: Callable[[Record], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    building: Progress | None = None,
    **options: Any,
) -> Summary:
    """Write and repair a sequence for each problem: `num` of the domain's own (20 by default), or
    those of the JSONL file `source` (`-`: stdin; at most `num`).

    `overrides` are key=value options of `ReflectConfig`, `options` the domain's own. `on_record` is
    given each new record as it is ready, `on_progress` (done, in all). `out` is a folder for
    results.jsonl and index.html, a page to look at, which is written also when a run ends early.
    `resume` keeps the results that are in `out` and goes on with the problems whose ids they lack;
    the settings should be those of the first run.

    Raises DecodeError for a line that cannot be used, before anything is decoded (`skip_bad` leaves
    such lines out and counts them), and where `out` holds results already (without `resume`); what
    `open_domain` and the domain's verifier raise.

    >>> decode_reflect("sudoku", ["steps=4"], num=5, blanks=10).rows()
    """
    folder = None if out is None else Path(out)
    summary = Summary(_held(folder, resume))
    if num is not None and num < 1:
        raise DecodeError(f"num={num}: at least 1 problem is needed")
    world = open_domain(domain, overrides, options, building) if isinstance(domain, str) else domain
    if source is not None and (own := sorted(world.OWN & set(options))):
        raise DecodeError(
            f"{own[0]} shapes problems of {domain}'s own: leave out {own[0]} or input"
        )
    items, total, summary.skipped = _items(world, source, num, skip_bad)
    left = _left(items, summary.records)
    begun, entries = time.monotonic(), [Entry(record, "") for record in summary.records]
    with _writer(folder) as file:
        try:
            for item, result in _decode(world, left, len(entries), total, on_progress):
                record = make_record(world, item, result)
                summary.records.append(record)
                if file is not None:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    picture = world.picture(item, result) if len(entries) < MAX_PICTURES else ""
                    entries.append(Entry(record, picture))
                if on_record is not None:
                    on_record(record)
        finally:
            summary.wall_s = time.monotonic() - begun
            if folder is not None:
                summary.page = write_page(folder / PAGE, entries, summary.rows())
    return summary


def make_record(domain: Domain, item: Item, result: ReflectResult) -> Record:
    """One line of the output."""

    def rating(value: Rating) -> Record:
        return {
            "hard": value.hard,
            "score": _number(value.score),
            "is_safe": value.is_safe,
            "violated": list(value.violated),
        }

    return {
        "id": item.problem.id,
        "draft": domain.describe(item, result.draft_T),
        "result": domain.describe(item, result.ids_T),
        "stop": str(result.stop),
        "is_safe": result.is_safe,
        "alone": None if result.alone is None else rating(result.alone),
        "before": rating(result.before),
        "after": rating(result.after),
        "measured": {
            "before": domain.measure(item, result.draft_T),
            "after": domain.measure(item, result.ids_T),
        },
        "iterations": result.iterations,
        "forwards": result.forwards,
        "row_forwards": result.row_forwards,
        "scorer_calls": result.scorer_calls,
        "bad_scores": result.bad_scores,
        "edits": [_edit(domain, edit) for edit in result.trace],
    }


def _edit(domain: Domain, edit: Edit) -> Record:
    moved = edit.moved_rating
    return {
        "unit": edit.unit,
        "old": domain.describe_unit(edit.old),
        "new": domain.describe_unit(edit.new),
        "moved_score": None if moved is None else _number(moved.score),
        "score": _number(edit.rating.score),
    }


def _number(score: float) -> float | None:
    """JSON has no infinity: a score that was no number is null."""
    return score if math.isfinite(score) else None


def _decode(
    domain: Domain,
    items: Iterator[Item],
    done: int,
    total: int,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Item, ReflectResult]]:
    while batch := list(itertools.islice(items, BATCH)):
        results = domain.reflector.run_many([item.problem for item in batch])
        for pair in zip(batch, results, strict=True):
            yield pair
            done += 1
            if on_progress is not None:
                on_progress(done, total)


def _read(
    domain: Domain, source: str, num: int | None, skip_bad: bool
) -> tuple[list[Item], list[str]]:
    """The problems of a file, and why lines were left out."""
    items, skipped = [], []
    name = "stdin" if source == "-" else source
    with _lines(source) as lines:
        for row in read_lines(lines):
            if len(items) == num:
                break
            try:
                if row.value is None:
                    raise TaskError(row.problem)
                items.append(domain.read(row.value, f"{Path(name).stem}/{row.index}"))
            except TaskError as error:
                problem = f"{name}, {row.place}: {error}"
                if not skip_bad:
                    raise DecodeError(
                        f"{problem}. Mend the line, or leave such lines out with --skip-bad"
                    ) from error
                skipped.append(problem)
    if not items:
        raise DecodeError(
            f"{name} holds no problem that can be used ({len(skipped)} lines skipped"
            + (f"; the first: {skipped[0]})" if skipped else "): give a line each")
        )
    return items, skipped


@contextmanager
def _lines(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield sys.stdin.buffer
        return
    if not Path(source).is_file():
        raise DecodeError(f"{source} is not a file: give a JSONL file of problems, or - for stdin")
    with Path(source).open("rb") as file:
        yield file


def _held(folder: Path | None, resume: bool) -> list[Record]:
    """The records that the folder holds; a last line that was cut off is taken out of the file."""
    if folder is None:
        if resume:
            raise DecodeError("resume needs the folder of the first run: give out")
        return []
    path = folder / RECORDS
    if not path.exists():
        return []
    if not resume:
        raise DecodeError(
            f"{folder} holds {RECORDS} already, which would be lost: choose another folder, or go "
            "on with it by --resume"
        )
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for row in read_lines(whole.splitlines(keepends=True)):
        if row.value is None or not set(row.value) >= {"id", "alone", "before", "after", "edits"}:
            raise DecodeError(f"{path}, {row.place} is no result: choose another folder")
        records.append(row.value)
    if len(whole) < len(content):
        write_atomic(path, whole.decode())
    return records


def _items(
    domain: Domain, source: str | Path | None, num: int | None, skip_bad: bool
) -> tuple[Iterable[Item], int, list[str]]:
    """The problems, made only when needed if they are the domain's own; how many; lines skipped."""
    if source is None:
        total = NUM_ITEMS if num is None else num
        return map(domain.make, range(total)), total, []
    items, skipped = _read(domain, str(source), num, skip_bad)
    return items, len(items), skipped


def _left(items: Iterable[Item], records: Sequence[Record]) -> Iterator[Item]:
    """The items without a record; of several with one id as many as records are missing."""
    held = Counter(record["id"] for record in records)
    for item in items:
        if held[item.problem.id]:
            held[item.problem.id] -= 1
        else:
            yield item


@contextmanager
def _writer(folder: Path | None) -> Iterator[IO[str] | None]:
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DecodeError(f"{folder} cannot be made ({error}): choose another folder") from error
    with (folder / RECORDS).open("a") as file:
        yield file
