"""What a reward function said about one sample: a number, "does not apply", or a typed failure.

A failure is never a score. Only `ok` carries a value; every other kind masks the sample, is counted
under `rewards/errors/<kind>`, and stops the run when there are too many. Nothing heavy is imported
here: the worker processes load this module.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

from rlalign.errors import RlalignError


class RewardError(RlalignError, RuntimeError):
    """A reward is misconfigured or fails too often; the message names the cause and the fix."""


class VerdictKind(enum.StrEnum):
    OK = "ok"  # scored, or does not apply
    TIMEOUT = "timeout"  # a deadline passed
    CRASH = "crash"  # the function raised, its process died, or its service was out of reach
    OOM = "oom"  # memory ran out
    INVALID = "invalid"  # it answered, but not with one finite number per completion


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for one sample. `value` is a finite number or None (does not apply), and None
    wherever `kind` is not ok; `detail` says what went wrong.

    >>> Verdict(VerdictKind.OK, 1.0), Verdict(VerdictKind.TIMEOUT, detail="no answer within 5 s")
    """

    kind: VerdictKind
    value: float | None = None
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.kind is not VerdictKind.OK


def ok(value: float | None) -> Verdict:
    return Verdict(VerdictKind.OK, value)


def read_output(output: Any, num_rows: int) -> list[Verdict]:
    """What a function returned as one verdict per row; anything but `num_rows` finite numbers, None
    or Verdicts is `invalid`."""
    if callable(getattr(output, "tolist", None)):  # numpy arrays and torch tensors
        output = output.tolist()
    if isinstance(output, (str, bytes, dict)) or not isinstance(output, Sized):
        what = f"returned {type(output).__name__} {_short(output)}"
        detail = f"{what}; expected a list of {num_rows} numbers or None, one per completion"
        return [Verdict(VerdictKind.INVALID, detail=detail)] * num_rows
    if len(output) != num_rows:
        detail = f"returned {len(output)} values for {num_rows} completions; expected one each"
        return [Verdict(VerdictKind.INVALID, detail=detail)] * num_rows
    return [read_value(value) for value in output]  # type: ignore[attr-defined]


def read_value(value: Any) -> Verdict:
    """One returned element as a verdict."""
    if isinstance(value, Verdict):
        return read_value(value.value) if value.kind is VerdictKind.OK else value
    if value is None:
        return ok(None)
    if callable(getattr(value, "item", None)) and getattr(value, "size", 1) != 0:
        value = value.item()  # numpy and torch scalars
    if not isinstance(value, numbers.Real):
        detail = f"returned {type(value).__name__} {_short(value)}; expected a number or None"
        return Verdict(VerdictKind.INVALID, detail=detail)
    if not math.isfinite(value):
        return Verdict(VerdictKind.INVALID, detail=f"returned {value}; expected a finite number")
    return ok(float(value))


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
