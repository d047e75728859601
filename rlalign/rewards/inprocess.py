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
from rlalign.rewards.verdict import RewardError, Verdict

GRACE_S = 5.0  # for functions that keep a deadline of their own


class InProcess:
    """The runner of one callable. `load` and `close` of the callable are called where it has
    them."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function
        self.takes = takes(function)

    def inspect(self) -> Takes:
        return self.takes

    def start(self) -> Takes:
        load = getattr(self._function, "load", None)
        if load is not None:
            load()
        return self.takes

    def score(self, call: Call, timeout_s: float) -> list[Verdict]:
        """One verdict per row; RewardError when the callable is still running past the deadline."""
        result: list[Verdict] = []
        function = self._function

        async def bounded(**arguments: Any) -> Any:
            async with asyncio.timeout(timeout_s):
                return await function(**arguments)

        def run() -> None:
            with asyncio.Runner() as runner:
                target = bounded if _is_async(function) else function
                result.extend(invoke(target, call.arguments(self.takes), len(call), runner))

        thread = threading.Thread(target=run, name=f"reward-{self.name}", daemon=True)
        thread.start()
        thread.join(timeout_s + GRACE_S)
        if thread.is_alive():
            raise RewardError(
                f"reward {self.name!r} was still running {timeout_s + GRACE_S:g} s after it was "
                "called (rewards.timeout_s), and a Python callable cannot be killed. Name it by "
                "import path (package.module:function) so that it runs in a worker, or raise "
                "rewards.timeout_s"
            )
        return result

    def close(self) -> None:
        close = getattr(self._function, "close", None)
        if close is not None:
            close()


def _is_async(function: Callable[..., Any]) -> bool:
    """Functions, partials of functions, and objects with an async `__call__`."""
    inner = getattr(function, "func", function)
    return asyncio.iscoroutinefunction(inner) or asyncio.iscoroutinefunction(
        getattr(inner, "__call__", None)  # noqa: B004 - the bound method itself is inspected
    )
