"""What every data source yields: raw rows, and the problem of those that are broken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlalign.tasks.errors import TaskError

MALFORMED = "malformed row"
MISSING_PROMPT = "missing prompt"
EMPTY_PROMPT = "empty prompt"
WRONG_TYPE = "wrong type"
TEMPLATE = "chat template refused"
TOO_LONG = "prompt too long"
MISSING_COMPLETIONS = "missing completions"
LENGTHS_DIFFER = "lengths differ"
NOT_FINITE = "not finite"
LONG_COMPLETION = "completion too long"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the source has it.

    `index` counts from 0 over all rows of the source, broken ones included, and makes the prompt's
    id; `place` is what a person looks for ("line 18"). A row that could not be read has `value`
    None and says why in `problem`.

    >>> RawRow(17, "line 18", {"prompt": "2+2=?", "answer": "4"})
    """

    index: int
    place: str
    value: Mapping[str, Any] | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """`label` is the first half of every prompt id: short, and the same on every machine."""

    label: str
    rows: Iterable[RawRow]


def numbered(values: Iterable[Any], start: int = 0) -> Iterable[RawRow]:
    """Rows of a source without lines: their places are "row 0", "row 1", ..."""
    for index, value in enumerate(values, start):
        if isinstance(value, Mapping):
            yield RawRow(index, f"row {index}", value)
        else:
            problem = f"a row is {type(value).__name__}, not a mapping of columns"
            yield RawRow(index, f"row {index}", None, problem)


def take_params(spec: str, params: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """`params` over `defaults`. Raises TaskError for a key that is not among the defaults."""
    unknown = sorted(set(params) - set(defaults))
    if unknown:
        raise TaskError(
            f"{spec} takes no parameter {', '.join(map(repr, unknown))}; "
            f"task.params may hold: {', '.join(sorted(defaults)) or 'nothing'}"
        )
    return {**defaults, **params}
