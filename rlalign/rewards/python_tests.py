"""Does the completion's code pass its tests? Runs in the sandbox, many programs at a time."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rlalign.rewards import sandbox
from rlalign.rewards.text import text_of
from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind, ok

logger = logging.getLogger(__name__)

_BLOCK = re.compile(r"^```([\w+-]*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class PythonTests:
    """The reward made by `python_tests`."""

    def __init__(
        self,
        column: str,
        partial: bool,
        fenced: bool,
        failure_score: float | None,
        limits: sandbox.Limits,
        allow_weak_isolation: bool,
        num_workers: int,
        deadline_s: float,
    ) -> None:
        self.required_columns = (column,)
        self._column = column
        self._partial = partial
        self._fenced = fenced
        self._failure_score = failure_score
        self._limits = limits
        self._allow_weak_isolation = allow_weak_isolation
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self._closed = False

    def load(self) -> None:
        """Probe the machine: RewardError when it cannot keep programs from the network or from
        files, unless that is allowed."""
        if not sys.platform.startswith("linux"):
            raise RewardError(f"reward 'python_tests' needs Linux; this is {sys.platform}")
        active = sandbox.isolation()
        absent = [name for name, on in active.items() if not on]
        if not active:
            raise RewardError("reward 'python_tests': the sandbox does not start on this machine")
        if {"network", "files"} & set(absent) and not self._allow_weak_isolation:
            raise RewardError(
                f"reward 'python_tests': this machine's kernel lacks isolation of {absent} (user "
                "namespaces, seccomp and Landlock were tried). Run in a container or virtual "
                "machine that you can lose and set allow_weak_isolation: true"
            )
        if absent:
            logger.warning("python_tests: isolation of %s is not available here", absent)

    def close(self) -> None:
        """Begin no further program."""
        self._closed = True

    def __call__(self, completions: list[Any], **columns: Any) -> list[Verdict]:
        """One verdict per completion; those not started by the deadline are timeouts."""
        deadline = time.monotonic() + self._deadline_s
        tests = columns[self._column]
        with ThreadPoolExecutor(self._num_workers, "sandbox") as threads:
            rows = zip(completions, tests, strict=True)
            pending = [threads.submit(self._timed, text_of(c), t, deadline) for c, t in rows]
            return [future.result() for future in pending]

    def _timed(self, text: str, tests: Any, deadline: float) -> Verdict:
        try:
            return self.one(text, tests, deadline)
        except TimeoutError as error:
            return Verdict(VerdictKind.TIMEOUT, detail=str(error))

    def one(self, text: str, tests: Any, deadline: float) -> Verdict:
        """Score of one completion in [0, 1]; does not apply where the tests are None. Raises
        TimeoutError when `deadline` passed before its programs could be started."""
        if tests is None:
            return ok(None)
        pairs, statements = read_tests(tests)
        if not pairs and not statements:
            detail = f"column {self._column!r} holds {str(tests)[:80]!r}; expected test statements "
            return Verdict(VerdictKind.INVALID, detail=detail + "or input/output pairs")
        code = code_of(text, self._fenced)
        if code is None:
            return ok(0.0)
        if statements:
            return self._score(self._run(code, statements, deadline))
        return self._score_pairs(code, pairs, deadline)

    def _score_pairs(self, code: str, pairs: Sequence[tuple[str, str]], deadline: float) -> Verdict:
        """Each pair in a fresh process; the expected output never enters it."""
        passed = 0
        for given, expected in pairs:
            outcome = self._run(code, (), deadline, stdin=given)
            if outcome.kind is not VerdictKind.OK:
                return self._score(outcome)
            correct = outcome.passed[0] and _same_output(outcome.stdout, expected)
            passed += correct
            if not correct and not self._partial:
                return ok(0.0)
        return ok(passed / len(pairs))

    def _run(
        self, code: str, tests: Sequence[str], deadline: float, stdin: str = ""
    ) -> sandbox.Outcome:
        remaining_s = deadline - time.monotonic()
        if self._closed or remaining_s <= 0:
            raise TimeoutError(f"not reached within {self._deadline_s:g} s")
        limits = replace(self._limits, wall_s=min(self._limits.wall_s, remaining_s))
        weak = self._allow_weak_isolation
        return sandbox.run(code, tests, stdin=stdin, limits=limits, allow_weak_isolation=weak)

    def _score(self, outcome: sandbox.Outcome) -> Verdict:
        if outcome.kind is VerdictKind.OK:
            share = sum(outcome.passed) / len(outcome.passed)
            return ok(share if self._partial else float(share == 1))
        if outcome.kind is not VerdictKind.INVALID and self._failure_score is not None:
            return ok(self._failure_score)
        return Verdict(outcome.kind, detail=outcome.detail)


def python_tests(
    column: str = "tests",
    partial: bool = False,
    fenced: bool = True,
    failure_score: float | None = None,
    wall_s: float = 10.0,
    cpu_s: int = 5,
    memory_bytes: int = 1 << 30,
    file_bytes: int = 8 << 20,
    scratch_bytes: int = 32 << 20,
    allow_weak_isolation: bool = False,
    num_workers: int | None = None,
    deadline_s: float = 60.0,
) -> PythonTests:
    """1 where the completion's code passes all tests of its row, else 0 (`partial`: the share).

    The code is the last ```python block (with `fenced` false, the whole completion). A row's tests
    are a list of statements ("assert f(2) == 4"), run after the code in its namespace, or a list of
    {"input": .., "output": ..}, compared with the program's standard output line by line. A wrong
    answer, an exception or code that does not parse scores 0. Code that runs into a limit or ends
    the interpreter is a verdict timeout, oom or crash: masked, unless `failure_score` gives it a
    score. Limits are per program run.
    """
    limits = sandbox.Limits(wall_s, cpu_s, memory_bytes, file_bytes, scratch_bytes)
    for name in ("wall_s", "cpu_s", "memory_bytes", "file_bytes", "scratch_bytes"):
        if getattr(limits, name) <= 0:
            value = getattr(limits, name)
            raise RewardError(f"reward 'python_tests': {name} = {value}; allowed: > 0")
    workers = num_workers or min(8, os.cpu_count() or 1)
    return PythonTests(
        column, partial, fenced, failure_score, limits, allow_weak_isolation, workers, deadline_s
    )


def code_of(text: str, fenced: bool = True) -> str | None:
    """The last block tagged python or py, else the last untagged one; None without any."""
    if not fenced:
        return text
    blocks = _BLOCK.findall(text)
    for tags in (("python", "py", "python3"), ("",)):
        tagged = [body for tag, body in blocks if tag.lower() in tags]
        if tagged:
            return tagged[-1]
    return None


def read_tests(tests: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """A row's tests as (input/output pairs, statements): one of the two is empty; both when the
    row holds neither form."""
    if not isinstance(tests, (str, Sequence)):
        return [], []
    rows: list[Any] = [tests] if isinstance(tests, str) else list(tests)
    if all(isinstance(row, str) for row in rows):
        return [], list(rows)
    if all(isinstance(row, Mapping) and {"input", "output"} <= set(row) for row in rows):
        return [(str(row["input"]), str(row["output"])) for row in rows], []
    return [], []


def _same_output(given: str, expected: str) -> bool:
    """Equal but for spaces at line ends and empty lines at the end."""
    return _lines(given) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
