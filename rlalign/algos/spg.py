"""SPG: good completions by a lower bound of their log-prob, bad ones by an upper bound.

Raising a lower bound raises the log-prob; lowering one need not lower it. With J passes, S_j what
pass j masks of a completion of L tokens, p_ij the probability of token i under it, t_j = |S_j| / L:

    low  = 1/J sum_j 1/|S_j| sum_{i in S_j} log p_ij
    high = mean over tokens that are masked at all of 1/b log( 1/J sum_j 1[i in S_j] p_ij^b / t_j )
    s_i  = low where A_i > 0,  c high + (1 - c) low where A_i < 0
    loss = 1/sum(m) sum_i -A_i L_i s_i,   A_i = R_i - mean_g R

b = `likelihood.eubo_power`, c = `likelihood.eubo_share`. Masks are those of a sampler that goes
block by block, with 15 % of the prompt and of earlier blocks masked as noise.
Wang et al. 2025, arXiv 2510.09541.

Legend: B rows, J passes, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.base import Algorithm
from rlalign.algos.elbo import combine, policy_weight, row_advantage
from rlalign.algos.loss import Figures, LossOutput
from rlalign.types import Masks, TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


def estimate_loss(
    logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int
) -> LossOutput:
    """The sandwiched loss (algos/base.py). Its metrics are the two bounds, nats per token."""
    assert batch.masks is not None
    low_B = combine(logp_BJT, batch.masks).sum(1)
    length_B = batch.mask_BT.sum(1)
    high_B = upper_bound(logp_BJT, batch.masks, length_B, cfg.likelihood.eubo_power)
    share, advantage_B = cfg.likelihood.eubo_share, row_advantage(batch)
    value_B = torch.where(advantage_B < 0, share * high_B + (1 - share) * low_B, low_B)
    rows = (length_B > 0).sum().to(low_B.dtype)
    metrics: Figures = {
        "elbo/lower": (low_B.detach().sum(), rows),
        "elbo/upper": (high_B.detach().sum(), rows),
    }
    return LossOutput(-(policy_weight(batch) * advantage_B * value_B).sum(), metrics)


def upper_bound(logp_BJT: Tensor, masks: Masks, length_B: Tensor, power: float) -> Tensor:
    """`high` of every row: [B], 0 for one without a scored token. In logarithms throughout:
    p^b of an unlikely token is no float."""
    scored_BJT = masks.weight_BJT.to(logp_BJT.device) != 0
    time_BJ1 = scored_BJT.sum(2, keepdim=True) / length_B[:, None, None].clamp(min=1)
    passes = scored_BJT.any(2).sum(1).clamp(min=1)
    lowest = torch.finfo(logp_BJT.dtype).min / 2  # below every term, and not inf - inf
    term_BJT = torch.where(scored_BJT, power * logp_BJT - time_BJ1.clamp(min=1e-30).log(), lowest)
    covered_BT = scored_BJT.any(1)
    total_BT = torch.where(covered_BT, term_BJT.logsumexp(1) - passes[:, None].log(), 0.0)
    return total_BT.sum(1) / power / covered_BT.sum(1).clamp(min=1)


ALGORITHM = Algorithm(
    name="spg",
    summary="Diffusion language models: lower bound for good completions, upper for bad ones.",
    source="Wang et al. 2025, arXiv 2510.09541",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "none",
        "importance_sampling_level": "sequence",
        "policy_loss": "reinforce",
        "loss_agg_mode": "token-mean",
        "beta": 0.0,
    },
    paper_settings={
        "num_generations": 6,
        "num_iterations": 4,
        "model.lora.rank": 128,
        "trainer.optim.learning_rate": 3e-6,
        "rollout.diffusion.block_size": 32,
        "rollout.diffusion.eos_policy": "masked",
        "rollout.temperature": 0.9,
    },
    fixed=("importance_sampling_level", "policy_loss"),
    likelihood={
        "estimator": "block_noise",
        "num_mc_samples": 2,
        "prompt_mask_prob": 0.15,
        "fresh_masks": True,
    },
    estimate_loss=estimate_loss,
    slopes_at_one=False,
)
