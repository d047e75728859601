"""The plug between a policy and the losses: what a log-prob is, and how its gradient is taken.

`TokenLikelihood` (token_likelihood.py; language models: exact, one forward pass) and
`ElboLikelihood` (elbo.py; diffusion language models: estimated over masks). Which one a run uses
follows from its model, so any algorithm of log-probs runs with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from rlalign.algos.metrics import Metrics
from rlalign.config import Config
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.types import Group, TrainBatch


class Reference(Protocol):
    """Log-probs of the reference model that were computed before, for all that can come."""

    def of(self, batch: TrainBatch) -> torch.Tensor:
        """float32 [B, T], 0 beyond a completion. KeyError for a sequence that it does not have."""
        ...


class Likelihood(Protocol):
    def prepare(
        self,
        engine: TrainEngine,
        batch: TrainBatch,
        groups: Sequence[Group],
        acc_B: torch.Tensor,
        config: Config,
        world: World,
        step: int,
        reference: Reference | None,
    ) -> TrainBatch:
        """Attach what the losses need before the first optimizer step: log-probs of the policy
        that sampled and of the reference, where they are used, and the advantages."""
        ...

    def of_iteration(self, batch: TrainBatch, iteration: int, config: Config) -> TrainBatch:
        """A prepared batch as pass `iteration` over it sees it."""
        ...

    def accumulate(
        self,
        engine: TrainEngine,
        minibatch: TrainBatch,
        config: Config,
        world: World,
        metrics: list[Metrics],
    ) -> int:
        """Add the gradient of the loss of these rows, with their weights; adds its figures to
        `metrics`. Returns the tokens that went through the model, of all processes."""
        ...

    def sequence_logp(self, engine: TrainEngine, sequence: Sequence[int]) -> torch.Tensor:
        """What the rollout engine's `score` says of tokens 1 onwards, by the trainer's weights:
        float32 [len - 1]."""
        ...
