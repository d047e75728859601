"""BGPO: policy optimisation of a diffusion language model in the memory of one forward pass.

With d_j = (ell_j - ell_j_old) / norm, the change of the estimate of log p(y) under the j-th of n
masks (the same for both policies), and the advantage A of the completion, the objective

    R = exp(mean_j d_j) A

needs all n forward passes at once. A lower bound on it is a sum over them, so each goes forward and
backward alone:

    R >= mean_j (1 + d_j) A   for A >= 0   (e^u >= 1 + u)
    R >= mean_j exp(d_j) A    for A < 0    (Jensen)

Value and gradient are those of R where the policy is the one that sampled (d = 0), that is, with
one optimizer step per rollout. Further away r_j = 1 + d_j or exp(d_j) is clipped as PPO's ratio is:

    g_j = min(r_j A, clip(r_j, 1 - epsilon, 1 + epsilon_high) A)
    loss = -1/|S| sum_i mean_j g_ij

which bounds the clipped objective min(RA, clip(R) A) from below, too: minima of concave functions
are concave. (The dual clip, `delta`, breaks that.) `norm=none` with `policy_loss=unclipped` is the
paper's own form; exp(d_j) of a whole completion then explodes soon. Two more surrogates:

    quadratic   for A < 0: r_j = 1 + d_j + (e - 2) d_j^2 up to d_j = 1, exp(d_j) beyond: looser
    exact       R itself, clipped or not, its gradient taken one pass at a time (elbo.py)

A_i as in GRPO. arXiv 2510.11683; clip and norm as in its published code's descendants.

Legend: M passes of any completions; B completions, J passes of each, T tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.base import Algorithm
from rlalign.algos.elbo import (
    num_passes,
    pass_estimates,
    ratio_divisor,
    row_advantage,
    row_weight,
)
from rlalign.algos.kl import MAX_LOG_RATIO
from rlalign.algos.loss import LossOutput
from rlalign.algos.surrogate import Clipped, surrogate
from rlalign.types import TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


def pass_loss(
    change_M: Tensor, advantage_M: Tensor, weight_M: Tensor, cfg: AlgoConfig
) -> LossOutput:
    """The bound's share of M passes. `change_M` are d, with graph; `weight_M` what a pass counts:
    its row's share of the loss over the row's passes."""
    ratio_M = pass_ratio(change_M, advantage_M, cfg)
    loss_M, clipped = surrogate(ratio_M, advantage_M, change_M, cfg)
    return LossOutput((weight_M * loss_M).sum(), _metrics(change_M, ratio_M, clipped))


def pass_ratio(change_M: Tensor, advantage_M: Tensor, cfg: AlgoConfig) -> Tensor:
    """r_j with its gradient."""
    negative_M = advantage_M < 0
    # Where the linear branch is taken exp must not be formed: inf * 0 is NaN in backward.
    bounded_M = torch.where(negative_M, change_M, 0.0).clamp(max=MAX_LOG_RATIO)
    jensen_M = bounded_M.exp()
    if cfg.likelihood.surrogate == "quadratic":
        parabola_M = 1 + bounded_M + (math.e - 2) * bounded_M**2
        jensen_M = torch.where(bounded_M <= 1, parabola_M, jensen_M)
    return torch.where(negative_M, jensen_M, 1 + change_M)


def exact_loss(
    logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int
) -> LossOutput:
    """-sum_i w_i min(R A, clip(R) A), of all passes at once: for `surrogate=exact`."""
    assert batch.masks is not None
    change_BJ = pass_changes(logp_BJT, batch, cfg, max_completion_length)
    change_B = change_BJ.mean(1)
    ratio_B = change_B.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss_B, clipped = surrogate(ratio_B, row_advantage(batch), change_B, cfg)
    counts_B = num_passes(batch.masks).to(loss_B.device) > 0
    metrics = _metrics(
        change_B[counts_B], ratio_B[counts_B], {k: v[counts_B] for k, v in clipped.items()}
    )
    return LossOutput((row_weight(batch) * loss_B).sum(), metrics)


def pass_changes(
    logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int
) -> Tensor:
    """d_j of every row: [B, J], with the gradient of `logp_BJT`."""
    assert batch.masks is not None
    now_BJ = pass_estimates(logp_BJT, batch.masks)
    old_BJ = now_BJ.detach()
    if batch.logp_old_BJT is not None:
        old_BJ = pass_estimates(batch.logp_old_BJT, batch.masks).to(now_BJ.dtype)
    return (now_BJ - old_BJ) / ratio_divisor(batch, cfg, max_completion_length)[:, None]


def _metrics(change_M: Tensor, ratio_M: Tensor, clipped: Clipped) -> dict:
    change_M, ratio_M = change_M.detach(), ratio_M.detach()
    count = torch.tensor(float(len(change_M)))
    metrics = {
        f"clip_ratio/{name}": (where_M.sum().float(), count) for name, where_M in clipped.items()
    }
    metrics["elbo/change"] = (change_M.abs().sum(), count)
    metrics["elbo/negative_ratio"] = ((ratio_M < 0).sum().float(), count)
    if len(change_M):
        metrics["elbo/change/max"] = change_M.max()
    return metrics


ALGORITHM = Algorithm(
    name="bgpo",
    summary="Diffusion language models: a bound that one forward pass at a time can train.",
    source="arXiv 2510.11683",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "loss_agg_mode": "seq-mean-token-mean",
        "beta": 0.0,
    },
    likelihood={"estimator": "count_strat", "num_mc_samples": 16},
    pass_loss=pass_loss,
    estimate_loss=exact_loss,
)
