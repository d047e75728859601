"""Reward functions in the trainer's own process: built-ins that cannot hang, and Python callables
given through the API.

A thread cannot be killed. A callable that overruns its deadline therefore stops the run with the
reason; one named by its import path runs in a worker and costs only a masked batch. Coroutines can
be cancelled and do not stop the run.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from rlalign.rewards.call import Call, Takes, invoke, takes
from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind

GRACE_S = 5.0  # for functions that keep a deadline of their own


class InProcess:
    """The runner of one callable. `load` and `close` of the callable are called where it has
    them."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function
        self.takes = takes(function)
        self._started = False
        self._ended = threading.Event()  # of the call under way

    def inspect(self) -> Takes:
        return self.takes

    def start(self) -> Takes:
        self._started = True
        load = getattr(self._function, "load", None)
        if load is not None:
            load()
        return self.takes

    def score(self, call: Call, timeout_s: float) -> list[Verdict]:
        """One verdict per row; RewardError when the callable is still running past the deadline."""
        result: list[Verdict] = []
        function = self._function
        self._ended.clear()

        async def bounded(**arguments: Any) -> Any:
            async with asyncio.timeout(timeout_s):
                return await function(**arguments)

        def run() -> None:
            try:
                with asyncio.Runner() as runner:
                    target = bounded if _is_async(function) else function
                    result.extend(invoke(target, call.arguments(self.takes), len(call), runner))
            finally:
                self._ended.set()

        thread = threading.Thread(target=run, name=f"reward-{self.name}", daemon=True)
        thread.start()
        if not self._ended.wait(timeout_s + GRACE_S):
            raise RewardError(
                f"reward {self.name!r} was still running {timeout_s + GRACE_S:g} s after it was "
                "called (rewards.timeout_s), and a Python callable cannot be killed. Name it by "
                "import path (package.module:function) so that it runs in a worker, or raise "
                "rewards.timeout_s"
            )
        detail = "it was closed while it ran, or left its thread (sys.exit?)"
        return result or [Verdict(VerdictKind.CRASH, detail=detail)] * len(call)

    def close(self) -> None:
        """Let go of a `score` that another thread may be in. A callable that was never started is
        left open: it was only looked at, and another runner may be about to use it."""
        close = getattr(self._function, "close", None)
        if close is not None and self._started:
            close()
        self._ended.set()


def _is_async(function: Callable[..., Any]) -> bool:
    """Functions, partials of functions, and objects with an async `__call__`."""
    inner = getattr(function, "func", function)
    return asyncio.iscoroutinefunction(inner) or asyncio.iscoroutinefunction(
        getattr(inner, "__call__", None)  # noqa: B004 - the bound method itself is inspected
    )
