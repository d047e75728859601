"""What an algorithm is: a name, a preset, and the decisions it takes differently from the rest.

The decisions are pure functions of small tensors. An algorithm that only combines the shared
pieces sets `defaults`; one with its own idea of credit or loss overrides that callable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from rlalign.algos.advantage import compute_advantages
from rlalign.algos.errors import AlgoError
from rlalign.algos.loss import LossOutput, policy_loss
from rlalign.types import TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

# The `AlgoConfig` fields that a preset fills, in the order in which they are printed.
PRESET_FIELDS = (
    "adv_estimator",
    "scale_rewards",
    "importance_sampling_level",
    "policy_loss",
    "epsilon",
    "epsilon_high",
    "delta",
    "loss_agg_mode",
    "prompt_weighting",
    "beta",
    "kl_estimator",
    "kl_in",
)


class Credit(Protocol):
    """Which advantage goes to which token: see advantage.compute_advantages."""

    def __call__(
        self,
        reward_B: Tensor,
        acc_B: Tensor,
        group_id_B: Tensor,
        mask_BT: Tensor,
        cfg: AlgoConfig,
        *,
        kl_BT: Tensor | None = None,
    ) -> Tensor: ...


class Loss(Protocol):
    """What scalar is minimised: see loss.policy_loss."""

    def __call__(
        self,
        logp_BT: Tensor,
        batch: TrainBatch,
        cfg: AlgoConfig,
        *,
        entropy_BT: Tensor | None = None,
    ) -> LossOutput: ...


class PassLoss(Protocol):
    """The loss of single passes of a diffusion language model, where it is a sum over them: see
    `bgpo.pass_loss`."""

    def __call__(
        self, change_M: Tensor, advantage_M: Tensor, weight_M: Tensor, cfg: AlgoConfig
    ) -> LossOutput: ...


class EstimateLoss(Protocol):
    """The loss of the log-probs under every mask: see elbo.py and `elbo.sequence_loss`."""

    def __call__(
        self, logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int
    ) -> LossOutput: ...


@dataclass(frozen=True)
class Algorithm:
    """A registered algorithm.

    `defaults` fill the unset fields of `AlgoConfig` (keys from PRESET_FIELDS; those left out come
    from the shared defaults). `paper_settings` are further settings of the publication that a
    config may want and that the preset does not impose. `fixed` are PRESET_FIELDS that it does not
    read, so a config that sets another value is refused. One with settings of `likelihood` is for
    diffusion language models alone. Raises AlgoError for an unknown key.

    >>> Algorithm("mine", "GRPO with a wider upper clip.", "our notes", {"epsilon_high": 0.3})
    """

    name: str
    summary: str
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    paper_settings: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    couples_rows: bool = False  # a row's loss depends on the current log-probs of its whole group
    allocator: str = "uniform"  # how many samples each prompt gets: algos/allocate.py
    tree: Mapping[str, Any] = field(default_factory=dict)  # what `algo.tree` leaves open
    likelihood: Mapping[str, Any] = field(default_factory=dict)  # what `algo.likelihood` does
    fixed: tuple[str, ...] = ()
    credit: Credit = compute_advantages
    loss: Loss = policy_loss
    pass_loss: PassLoss | None = None
    estimate_loss: EstimateLoss | None = None
    slopes_at_one: bool = True  # no value enters the slopes of `estimate_loss` where the ratio is 1

    def __post_init__(self) -> None:
        unknown = sorted({*self.defaults, *self.fixed} - set(PRESET_FIELDS))
        if unknown:
            raise AlgoError(
                f"algorithm {self.name!r}: defaults has {', '.join(unknown)}, which a preset "
                f"cannot fill; it can fill {', '.join(PRESET_FIELDS)}"
            )
