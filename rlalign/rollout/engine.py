"""The rollout engine protocol: batched token-in, token-out.

Every engine passes tests/rollout/conformance.py, so the loop never asks which one it talks to;
what an engine cannot do it says in its `capabilities`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rlalign.errors import RlalignError
from rlalign.types import PolicyVersion, Sample


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 switch the filters
    off.

    Reported log-probs are those of the distribution actually sampled from: after temperature, and
    after top-p/top-k where they are on. At temperature 0 they are taken at temperature 1. With
    `num_top`, the likeliest tokens of that distribution are reported too (`Sample.top`).
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # always draw max_completion_length tokens: for benchmarks
    num_top: int = 0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Draw `len(seeds)` completions of one prompt, one per seed, numbered from `first_index`, of at
    most `max_completion_length` tokens (None: those of the `SamplingParams`). With `params` they
    are drawn by these instead of the call's.

    >>> GenerateRequest("gsm8k/17", (3, 9, 4), seeds=(11, 12, 13, 14))
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    first_index: int = 0
    max_completion_length: int | None = None
    params: SamplingParams | None = None

    def limited(self, params: SamplingParams) -> SamplingParams:
        """How this request is drawn in a call with `params`."""
        params = self.params or params
        if self.max_completion_length is None:
            return params
        return dataclasses.replace(params, max_completion_length=self.max_completion_length)


@dataclass(frozen=True, slots=True)
class Capabilities:
    shares_parameters: bool  # reads the trainer's own parameters: update_weights moves nothing
    hidden_states: bool  # `hidden_states` works
    score_temperature: bool  # `score` takes a temperature other than 1
    adapter_only: bool = False  # `update_weights` takes a LoRA adapter's tensors, not the policy's


class EngineError(RlalignError, RuntimeError):
    """The engine failed or was asked for something it cannot do; the message names the cause and
    the fix."""


class WeightsLost(EngineError):
    """The engine was started again and does not have the weights that it was sent: send them
    again."""


class RolloutEngine(Protocol):
    capabilities: Capabilities

    @property
    def version(self) -> PolicyVersion:
        """Of the weights in use now; (0, "") before the first update."""
        ...

    def generate(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> list[list[Sample]]:
        """One list of samples per request, in order. Equal seed, prompt and weights give equal
        tokens whatever else is in the batch. `Sample.text` is the decoded completion without
        special tokens."""
        ...

    def score(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """Log-prob of every token given its prefix: float32 [len - 1] per sequence, for tokens 1
        onwards."""
        ...

    def update_weights(
        self, parameters: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> PolicyVersion:
        """Take new weights (HF names), drop prefix caches, and return the version with the digest
        of what was received (rollout/digest.py). All or nothing: on failure the old weights stay
        in use."""
        ...

    def sleep(self) -> None:
        """Free accelerator memory between rollouts, where the engine can; else nothing."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...
