"""The other processes of a job: what the first one sends is theirs too."""

from __future__ import annotations

import time
from collections.abc import Callable

from rlalign.rollout.channels import Post, Receipt, Weights
from rlalign.rollout.engine import EngineError

POLL_S = 0.01


class FollowChannel:
    """`state` asks the server for the job's version and digest."""

    def __init__(self, state: Callable[[], Receipt], timeout_s: float) -> None:
        self._state, self._timeout_s = state, timeout_s

    def send(self, weights: Weights, version: int, post: Post) -> Receipt:
        """Wait until the engine has `version`. The weights are gone through, not sent: gathering
        them may take every process, and whoever compares digests has its own."""
        for _ in weights:
            pass
        deadline = time.monotonic() + self._timeout_s
        while True:
            state = self._state()
            if state["version"] == version and state["digest"]:  # without one, none came yet
                return state
            if time.monotonic() > deadline:
                raise EngineError(
                    f"waiting for version {version}: the server has version {state['version']} "
                    f"after {self._timeout_s:g} s; the job's first process did not send it"
                )
            time.sleep(POLL_S)

    def close(self) -> None: ...
