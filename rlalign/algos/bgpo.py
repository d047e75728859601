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
    exact       R itself, clipped or not, its gradient taken one pass at a time (elbo.py); the only
                one that takes a KL (beta > 0)

exp takes d up to 20; beyond, the bound is that of d = 20. A_i as in GRPO.
arXiv 2510.11683; clip and norm as in an independent implementation.

Legend: M passes of any completions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.base import Algorithm
from rlalign.algos.elbo import change_metrics, sequence_loss
from rlalign.algos.kl import MAX_LOG_RATIO
from rlalign.algos.loss import LossOutput
from rlalign.algos.surrogate import surrogate

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


def pass_loss(
    change_M: Tensor, advantage_M: Tensor, weight_M: Tensor, cfg: AlgoConfig
) -> LossOutput:
    """The bound's share of M passes. `change_M` are d, with graph; `weight_M` what a pass counts:
    its row's share of the loss over the row's passes."""
    ratio_M = pass_ratio(change_M, advantage_M, cfg)
    loss_M, clipped = surrogate(ratio_M, advantage_M, change_M, cfg)
    return LossOutput((weight_M * loss_M).sum(), change_metrics(change_M, ratio_M, clipped))


def pass_ratio(change_M: Tensor, advantage_M: Tensor, cfg: AlgoConfig) -> Tensor:
    """r_j with its gradient."""
    negative_M = advantage_M < 0
    # Capped also where the linear branch is taken: inf * 0 would be NaN in backward.
    bounded_M = change_M.clamp(max=MAX_LOG_RATIO)
    jensen_M = bounded_M.exp()
    if cfg.likelihood.surrogate == "quadratic":
        parabola_M = 1 + bounded_M + (math.e - 2) * bounded_M**2
        jensen_M = torch.where(bounded_M <= 1, parabola_M, jensen_M)
    return torch.where(negative_M, jensen_M, 1 + change_M)


ALGORITHM = Algorithm(
    name="bgpo",
    summary="Diffusion language models: a bound that one forward pass at a time can train.",
    source="arXiv 2510.11683",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "sequence",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "loss_agg_mode": "seq-mean-token-mean",
        "beta": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k2",
    },
    paper_settings={
        "num_generations": 8,
        "trainer.prompts_per_step": 16,
        "trainer.optim.learning_rate": 5e-7,
    },
    fixed=("importance_sampling_level", "kl_estimator"),
    likelihood={"estimator": "count_strat", "num_mc_samples": 16},
    pass_loss=pass_loss,
    estimate_loss=sequence_loss,
)
