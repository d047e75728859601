"""From the columns of a prompt to its completions with their scores, checked.

The shapes that data comes in, by the columns that are there:

    completions, scores                lists of k            any number of completions of a prompt
    chosen, rejected [, margin]        one of each           scores +-margin/2, or +-1/4 without one
    y1, y2, r1, r2                     one of each           a pair with the score of each
    completion, score                  one a row             rows with the same prompt are a group

With scores of +-1/4 the contrast of a preferred and a rejected completion is 1/2, the target of IPO
(Azar et al. 2023, arXiv 2310.12036, eq. 17).

A completion is a string, or messages that end with one turn of the assistant; turns before it must
be those of the prompt. Further columns, one entry a completion: `completion_ids` (then nothing is
tokenised), `truncated`, `source` (who wrote it), `ref_logps` (sums over a completion's tokens). One
entry a prompt: `prompt_ids`, `weights` (how much it counts beside the others).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from rlalign.tasks.rows import RowProblem
from rlalign.tasks.source import LENGTHS_DIFFER, MISSING_COMPLETIONS, NOT_FINITE, WRONG_TYPE
from rlalign.types import Prompt

Columns = Mapping[str, Any]

IPO_SCORE = 0.25
LARGEST = float(torch.finfo(torch.float32).max)
LARGEST_LOGP = 1e-3  # rounding apart, a log-prob is at most 0
EACH = ("completion_ids", "truncated", "source", "ref_logps")  # one entry a completion


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a prompt as the data has it; `score` is NaN where rewards are to say it.

    >>> Completion(0, "83", None, 1.0, truncated=False, source="human", ref_logp=None)
    """

    index: int  # among those of the prompt
    text: str | None  # None: given as token ids only
    token_ids: tuple[int, ...] | None  # None: to be tokenised
    score: float
    truncated: bool
    source: str
    ref_logp: float | None


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """`single`: one completion of what may be several rows with the same prompt."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    weight: float
    single: bool


def read_scored(prompt: Prompt, *, need_scores: bool) -> ScoredRow:
    """The completions among the columns of `prompt`. Raises RowProblem."""
    columns = {name: value for name, value in prompt.columns.items() if value is not None}
    shape, read = _shape_of(columns)
    found = read(columns)
    texts = found.pop("completions", None)
    count = len(texts if texts is not None else found["completion_ids"])
    if not count:
        raise RowProblem(MISSING_COMPLETIONS, "an empty list")
    if texts is None:
        texts = [None] * count
    scores = found.pop("scores", None)
    if scores is None and need_scores:
        raise RowProblem(MISSING_COMPLETIONS, f"no scores; columns: {', '.join(columns)}")
    scores = [math.nan] * count if scores is None else _numbers("scores", _list("scores", scores))
    each = {name: _list(name, found.get(name, [None] * count)) for name in EACH}
    for name, values in {"scores": scores, **each}.items():
        if len(values) != count:
            raise RowProblem(LENGTHS_DIFFER, f"{count} completions, {len(values)} {name}")
    completions = tuple(
        Completion(
            index=i,
            text=None if text is None else _text(i, text, prompt.source),
            token_ids=None if ids is None else _token_ids(f"completion_ids {i}", ids),
            score=score,
            truncated=_flag(i, truncated),
            source="" if source is None else str(source),
            ref_logp=None if logp is None else _ref_logp(i, logp),
        )
        for i, (text, score, (ids, truncated, source, logp)) in enumerate(
            zip(texts, scores, zip(*each.values(), strict=True), strict=True)
        )
    )
    return ScoredRow(_own_ids(prompt), completions, _weight(columns), shape == "completion")


def _shape_of(columns: Columns) -> tuple[str, Callable[[Columns], dict[str, Any]]]:
    for needed, read in SHAPES.items():
        if all(name in columns for name in needed):
            return needed[0], read
    found = ", ".join(columns) or "none besides the prompt"
    raise RowProblem(MISSING_COMPLETIONS, f"columns: {found}")


def _grouped(columns: Columns) -> dict[str, Any]:
    names = ("completions", "scores", *EACH)
    found = {name: columns[name] for name in names if name in columns}
    for name in ("completions", "completion_ids"):
        if name in found:
            found[name] = _list(name, found[name])
    return found


def _preference(columns: Columns) -> dict[str, Any]:
    score = IPO_SCORE
    if "margin" in columns:
        score = _numbers("margin", [columns["margin"]])[0] / 2
    return {
        **_grouped(columns),
        "completions": [columns["chosen"], columns["rejected"]],
        "scores": [score, -score],
    }


def _pair(columns: Columns) -> dict[str, Any]:
    return {
        **_grouped(columns),
        "completions": [columns["y1"], columns["y2"]],
        "scores": [columns["r1"], columns["r2"]],
    }


def _single(columns: Columns) -> dict[str, Any]:
    found = {name: [columns[name]] for name in EACH if name in columns}
    if "score" in columns:
        found["scores"] = [columns["score"]]
    return {**found, "completions": [columns["completion"]]}


# By the columns that each needs; the first that fits is taken.
SHAPES: Mapping[tuple[str, ...], Callable[[Columns], dict[str, Any]]] = {
    ("completions",): _grouped,
    ("chosen", "rejected"): _preference,
    ("y1", "y2", "r1", "r2"): _pair,
    ("completion",): _single,
    ("completion_ids",): _grouped,
}


def _text(i: int, value: Any, prompt: Any) -> str:
    """What the assistant said."""
    if isinstance(value, str):
        text = value
    else:
        turns = _list(f"completion {i}", value)
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if [_said(turn) for turn in turns[:-1]] == [_said(turn) for turn in before]:
            turns = turns[-1:]
        if len(turns) != 1 or _said(turns[0])[0] != "assistant":
            roles = ", ".join(str(_said(turn)[0]) for turn in turns) or "none"
            raise RowProblem(
                WRONG_TYPE,
                f"completion {i} has turns of {roles}; it is one turn of the assistant, after "
                "those of the prompt or alone",
            )
        text = _said(turns[0])[1]
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise RowProblem(WRONG_TYPE, f"completion {i} is no text: {error}") from error
    return text


def _said(turn: Any) -> tuple[Any, Any]:
    return (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (turn, None)


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise RowProblem(WRONG_TYPE, f"{name} is {type(value).__name__}, not a list")
    return list(value)


def _numbers(name: str, values: Sequence[Any]) -> list[float]:
    for i, value in enumerate(values):
        if not isinstance(value, Real):
            raise RowProblem(WRONG_TYPE, f"{name}[{i}] is {value!r}, not a number")
    numbers = [float(value) for value in values]
    wrong = [i for i, number in enumerate(numbers) if not abs(number) <= LARGEST]
    if wrong:
        raise RowProblem(
            NOT_FINITE,
            f"{name} must be finite; found {len(wrong)} non-finite, the first {name}[{wrong[0]}] "
            f"= {numbers[wrong[0]]}",
        )
    return numbers


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = _list(name, value)
    if not ids or not all(isinstance(token, int) for token in ids):
        raise RowProblem(WRONG_TYPE, f"{name} is {str(ids)[:40]}, not a list of token ids")
    return tuple(ids)


def _flag(i: int, value: Any) -> bool:
    if value not in (None, True, False):
        raise RowProblem(WRONG_TYPE, f"truncated[{i}] is {value!r}, not true or false")
    return bool(value)


def _ref_logp(i: int, value: Any) -> float:
    if not isinstance(value, Real):
        raise RowProblem(WRONG_TYPE, f"ref_logps[{i}] is {value!r}, not a number")
    logp = float(value)
    if not -LARGEST <= logp <= LARGEST_LOGP:
        raise RowProblem(
            NOT_FINITE,
            f"the reference assigns {logp} to completion {i}; a log-prob is finite and at most 0 "
            "(wrong tokenizer or banned tokens)",
        )
    return logp


def _weight(columns: Columns) -> float:
    [weight] = _numbers("weights", [columns.get("weights", 1.0)])
    if weight < 0:
        raise RowProblem(WRONG_TYPE, f"weights is {weight}; it is one number a prompt, >= 0")
    return weight


def _own_ids(prompt: Prompt) -> Prompt:
    """With the token ids that the data gives, where it does."""
    ids = prompt.columns.get("prompt_ids")
    if ids is None:
        return prompt
    return Prompt(
        prompt.id, _token_ids("prompt_ids", ids), prompt.source, prompt.answer, prompt.columns
    )
