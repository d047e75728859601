"""Is the completion's final answer mathematically equal to the `answer` column (math-verify)?

It runs in workers only: comparing hostile expressions (power towers, huge factorials) can take for
ever or all memory, and the alarm that ends it fires on a main thread only.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlalign.rewards.text import ANSWER_TAG, last_group, text_of
from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind, ok

# What sympy and the LaTeX parser raise for text that is no mathematics or compares to nothing.
_NOT_COMPARABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError)
_NOT_COMPARABLE += (SyntaxError, TypeError, ValueError)


class _Expired(BaseException):
    """Passes through the handlers of math-verify, which catch Exception."""


class MathReward:
    """The reward made by `math`."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._answer_tag = re.compile(ANSWER_TAG, re.DOTALL)

    def load(self) -> None:
        """Import the library, and compare once, which imports the rest of sympy: a second or two
        that must not count as a row's time."""
        import math_verify

        self._parse, self._verify = math_verify.parse, math_verify.verify
        self._compare("\\boxed{x^2+2x+1}", "(x+1)^2")
        logging.getLogger("math_verify").setLevel(
            logging.ERROR
        )  # "timeout is disabled": ours is on

    def __call__(self, completions: list[Any], answer: list[Any], **_: Any) -> list[Verdict]:
        return [self.one(text_of(c), a) for c, a in zip(completions, answer, strict=True)]

    def one(self, text: str, answer: Any) -> Verdict:
        """1 or 0; does not apply where the answer is None; `invalid` where the answer itself is no
        mathematics; `timeout` past `timeout_s`."""
        if answer is None:
            return ok(None)
        try:
            with _alarm(self.timeout_s):
                return self._compare(text, str(answer))
        except _Expired:
            detail = f"comparing with {str(answer)[:80]!r} took more than {self.timeout_s:g} s"
            return Verdict(VerdictKind.TIMEOUT, detail=detail)

    def _compare(self, text: str, answer: str) -> Verdict:
        gold = self._read(_wrap(answer.rpartition("####")[2]))
        if not gold:
            detail = f"the answer column holds {answer[:80]!r}, which math-verify cannot read"
            return Verdict(VerdictKind.INVALID, detail=detail)
        tagged = last_group(self._answer_tag, text)
        given = self._read(text if tagged is None else _wrap(tagged))
        return ok(float(any(self._equal(g, t) for g, t in itertools.product(gold, given))))

    def _read(self, text: str) -> list[Any]:
        try:
            return self._parse(text, parsing_timeout=0, raise_on_error=True)
        except _NOT_COMPARABLE:
            return []

    def _equal(self, gold: Any, given: Any) -> bool:
        try:
            return self._verify(gold, given, timeout_seconds=0, raise_on_error=True)
        except _NOT_COMPARABLE:
            return False


def math(timeout_s: float = 5.0) -> MathReward:
    """1 where the completion's answer equals `answer` as mathematics, else 0.

    The completion's answer is the last `<answer>..</answer>`, else what math-verify finds
    (`\\boxed{}`, LaTeX, plain numbers). `answer` may be plain ("3/4"), LaTeX, or end in "#### 72"
    as GSM8K's do. `timeout_s` is per row.
    """
    if timeout_s <= 0:
        raise RewardError(f"reward 'math': timeout_s = {timeout_s}; allowed: > 0")
    if importlib.util.find_spec("math_verify") is None:
        raise RewardError(
            "reward 'math' needs math-verify, which is not installed: "
            "pip install 'math-verify>=0.9'"
        )
    return MathReward(timeout_s)


def _wrap(text: str) -> str:
    """Text that is wholly an answer, marked as one: a bare `x+1` or `(1,2)` is not found else."""
    text = text.strip()
    return text if "\\boxed" in text or "$" in text else f"\\boxed{{{text}}}"


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def expire(*_: Any) -> None:
        raise _Expired

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
