"""GVM: samples go where they reduce the variance of the gradient most.

RAFT is an EM algorithm: the rationale y is latent, and accepted samples stand for its posterior Q.
With n_i samples of prompt i, accepted with probability p_i, the gradient's estimator

    - sum_i 1/(n_i p_i) sum_{accepted j} g_ij,   g_ij = grad log pi(y_ij | x_i)

is unbiased (Lemma 1), and its trace variance is

    sum_i 1/n_i ( E_Q |g|^2 / p_i - |E_Q g|^2 ).

Without the last term (or with it: grad_stat=exact), and with G_i^2 for E_Q |g|^2, what is smallest
under sum n_i = N is (Proposition 1)

    n_i = N w_i / sum w,   w_i = G_i / sqrt(p_i + alpha p_i^(1 - beta)),

where alpha and beta damp prompts that are hardly ever right; w_i = 0 where nothing was. p_i and
G_i come from a pilot: the share of N' samples that is accepted, and the mean norm of their
gradients (mean of norms, as published; grad_stat=rms: the root of the mean square, as derived).

An accepted sample counts by its prompt, 1/|D_i| of the prompt's D_i (prompt_weighting=prompt,
Algorithm 1 of the paper): that is unbiased up to the prompts of which nothing is accepted. The
published code does without (prompt_weighting=sample with loss_agg_mode=token-mean), and then a
prompt counts in proportion to n_i p_i, another objective.
Yao et al. 2025, arXiv 2505.02391. Where paper and code differ: docs/allocation.md.

Legend: m prompts of a shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos import grpo, raft
from rlalign.algos.base import Algorithm
from rlalign.algos.pilot import PilotStats

if TYPE_CHECKING:
    from rlalign.config.schema import AllocationConfig


def gvm_weights(rate_m: Tensor, norm_m: Tensor, alpha: float = 1e-3, beta: float = 2.0) -> Tensor:
    """w of Proposition 1, float64 [m]; 0 where the accept rate or the norm is 0 or not finite.

    rate_m: p, 0 to 1. norm_m: G >= 0. alpha >= 0, beta >= 1.
    """
    rate_m, norm_m = rate_m.double(), norm_m.double()
    known_m = rate_m.isfinite() & norm_m.isfinite() & (rate_m > 0) & (norm_m > 0)
    rate_m = torch.where(known_m, rate_m, 1.0)
    weight_m = norm_m / (rate_m + alpha * rate_m ** (1 - beta)).sqrt()
    return torch.where(known_m, weight_m, 0.0)


def weights(stats: PilotStats, cfg: AllocationConfig) -> Tensor:
    """What a pilot says each prompt of the shard should get, [m]; filters are `filtered`'s."""
    rate_m = stats.rate_m
    if cfg.grad_params == "none":
        return gvm_weights(rate_m, torch.ones_like(rate_m), cfg.alpha, cfg.beta)
    if cfg.grad_stat == "exact":
        spread_m = (stats.right_square_m - rate_m * stats.right_mean_square_m).clamp(min=0)
        return gvm_weights(rate_m, spread_m.sqrt(), cfg.alpha, cfg.beta)
    norm_m = stats.right_square_m.sqrt() if cfg.grad_stat == "rms" else stats.right_norm_m
    return gvm_weights(rate_m, norm_m, cfg.alpha, cfg.beta)


def filtered(weight_m: Tensor, rate_m: Tensor, budget: int, cfg: AllocationConfig) -> Tensor:
    """Weights with 0 for prompts that are too easy (`filter_threshold`), or of which fewer than
    `filter_insufficient` accepted samples are expected. Both are in the published code only."""
    if cfg.filter_threshold is not None:
        weight_m = torch.where(rate_m > cfg.filter_threshold, 0.0, weight_m)
    if cfg.filter_insufficient:
        expected_m = rate_m * weight_m / weight_m.sum() * budget
        weight_m = torch.where(expected_m < cfg.filter_insufficient, 0.0, weight_m)
    return weight_m


SOURCE = "Yao et al. 2025, arXiv 2505.02391"
BY_PROMPT = {"prompt_weighting": "prompt"}

ALGORITHMS = (
    Algorithm(
        name="gvm_raft",
        summary="RAFT, with samples where they reduce the gradient's variance most.",
        source=SOURCE,
        defaults={**raft.SHARED, "policy_loss": "reinforce", **BY_PROMPT},
        paper_settings={"allocation.num_pilot_samples": 8, "allocation.budget_per_prompt": 8},
        allocator="gvm",
    ),
    Algorithm(
        name="gvm_raft++",
        summary="RAFT++ with GVM's samples.",
        source=SOURCE,
        defaults={**raft.SHARED, **raft.PLUS_PLUS, **BY_PROMPT},
        paper_settings={"num_minibatches": 4, "beta": 0.001, "epsilon_high": 0.4},
        aliases=("gvm_raft_plus_plus",),
        allocator="gvm",
    ),
    Algorithm(
        name="gvm_grpo",
        summary="GRPO with GVM's samples.",
        source=SOURCE,
        defaults={**grpo.ALGORITHM.defaults, **BY_PROMPT},
        paper_settings={"num_minibatches": 4, "allocation.group_size": 4},
        allocator="gvm",
    ),
)
