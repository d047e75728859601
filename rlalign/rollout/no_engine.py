"""The engine of a run that samples nothing (`rollout.engine=none`)."""

from __future__ import annotations

from typing import Any, NoReturn

from rlalign.rollout.engine import Capabilities, EngineError
from rlalign.types import PolicyVersion


class NoEngine:
    """A `RolloutEngine` without a model. Whatever it is asked for is an EngineError."""

    capabilities = Capabilities(shares_parameters=True, hidden_states=False, score_temperature=True)
    version = PolicyVersion(0, "")

    def generate(self, requests: Any, params: Any) -> NoReturn:
        _refuse("samples nothing")

    def score(self, sequences: Any, temperature: float = 1.0) -> NoReturn:
        _refuse("scores nothing")

    def update_weights(self, parameters: Any, version: int) -> NoReturn:
        _refuse("takes no weights")

    def sleep(self) -> None:
        """Nothing is awake."""

    def wake(self) -> None:
        """Nothing sleeps."""

    def close(self) -> None:
        """Nothing is open."""


def _refuse(what: str) -> NoReturn:
    raise EngineError(f"rollout.engine=none {what}: use rollout.engine=hf, vllm or server")
