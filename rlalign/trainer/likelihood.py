"""The plug between a policy and the losses: what a log-prob is, and how its gradient is taken.

`TokenLikelihood` (language models: exact, one forward pass) is update.py's own functions;
`ElboLikelihood` (diffusion language models: estimated over masks) is in elbo.py. Which one a run
uses follows from its model, so any algorithm of log-probs runs with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from rlalign.algos.metrics import Metrics
from rlalign.config import Config
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.types import Group, TrainBatch

if TYPE_CHECKING:
    from rlalign.trainer.reference_cache import ReferenceLogps


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
        reference: ReferenceLogps | None,
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
