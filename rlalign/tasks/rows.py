"""From a raw row to a checked one: which column is the prompt, which the answer, is each whole.

`answer`, `ground_truth` and `solution` are one column; where a row has several, the first of them
in that order is the answer and the others stay columns of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlalign.tasks.source import EMPTY_PROMPT, MALFORMED, MISSING_PROMPT, WRONG_TYPE, RawRow

ANSWER_NAMES = ("answer", "ground_truth", "solution")
ROLES = ("system", "user", "assistant", "tool", "developer")

Messages = list[dict[str, Any]]


class RowProblem(ValueError):
    """A row that cannot become a prompt: `kind` is one of the constants of tasks/source.py."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, slots=True)
class Row:
    """>>> Row(17, "line 18", "2+2=?", "4", {"level": 1})"""

    index: int
    place: str
    prompt: str | Messages
    answer: Any
    columns: dict[str, Any]


def read_row(raw: RawRow, renamed: Mapping[str, str]) -> Row:
    """The row with its columns sorted out. `renamed` maps `prompt` or `answer` (or any name of
    ours) to the source's column of that meaning.

    Raises RowProblem.
    """
    if raw.value is None:
        raise RowProblem(MALFORMED, raw.problem)
    columns = dict(raw.value)
    for ours, theirs in renamed.items():
        columns[ours] = columns.pop(theirs, None)
    if columns.get("prompt") is None:
        found = ", ".join(map(str, raw.value)) or "none"
        raise RowProblem(MISSING_PROMPT, f"columns: {found}")
    prompt = columns.pop("prompt")
    prompt = _check_text(prompt) if isinstance(prompt, str) else _check_messages(prompt)
    answer = next((name for name in ANSWER_NAMES if columns.get(name) is not None), None)
    return Row(raw.index, raw.place, prompt, columns.pop(answer) if answer else None, columns)


def _check_text(text: str) -> str:
    if not text.strip():
        raise RowProblem(EMPTY_PROMPT, repr(text[:20]))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        detail = f"half a character, {text[error.start]!r}, at position {error.start}"
        raise RowProblem(MALFORMED, detail) from error
    return text


def _check_messages(messages: Any) -> Messages:
    if not isinstance(messages, list):
        kind = type(messages).__name__
        raise RowProblem(WRONG_TYPE, f"prompt is {kind}, not a string or a list of messages")
    if not messages:
        raise RowProblem(EMPTY_PROMPT, "no messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise RowProblem(
                WRONG_TYPE, f"message {i} is no mapping with a role among {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise RowProblem(WRONG_TYPE, f"content of message {i} is {kind}, not a string")
    if messages[-1]["role"] == "assistant":
        raise RowProblem(WRONG_TYPE, "the last message is the assistant's: nothing to answer")
    _check_text(messages[-1]["content"])
    return [dict(message) for message in messages]
