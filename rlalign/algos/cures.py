"""CurES: prompts are chosen by how much there is to learn, and get samples by how much their
gradient varies.

A prompt that is right with probability p is drawn, with replacement, with probability

    rho(x) = exp( sqrt(p (1 - p)) / tau ) / sum,

and of the N samples of a step the drawn prompts get n_i = N sigma_i / sum sigma, where sigma^2 is
the trace variance of (r - p) g with g = grad log pi(y|x), E_1 and E_0 over right and wrong samples:

    sigma^2 = p (1-p)^2 E_1|g|^2 + p^2 (1-p) E_0|g|^2 - p^2 (1-p)^2 |E_1 g - E_0 g|^2.

Since p E_1 g + (1-p) E_0 g = 0 the last term is p^2 |E_1 g|^2, so only right samples need a mean
gradient. The published code takes (E_1|g| - E_0|g|)^2 in its place (compat=official), which makes
sigma^2 the variance of (r - p) |g|, no bound in general. It also spreads rho to within 0.3 % of
uniform; tau is stated in neither.

p is the mean (a + 1) / (a + b + 2) of a Beta posterior over all samples of the shard: the pilot's a
right and b wrong ones, and those of every step since. sigma is measured in the pilot only.
Zeng et al. 2025, arXiv 2510.01037.

Legend: m prompts of a shard, float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos import grpo, reinforce_plus_plus
from rlalign.algos.base import Algorithm
from rlalign.algos.pilot import PilotStats

if TYPE_CHECKING:
    from rlalign.config.schema import AllocationConfig


def sampling_probs(rate_m: Tensor, tau: float) -> Tensor:
    """rho, [m], adds up to 1. rate_m: p, 0 to 1. tau > 0: towards 0 only prompts nearest to
    p = 1/2 are drawn, towards infinity all alike."""
    rate_m = rate_m.double()
    return ((rate_m * (1 - rate_m)).sqrt() / tau).softmax(0)


def sigma(
    rate_m: Tensor, right_square_m: Tensor, wrong_square_m: Tensor, mean_term_m: Tensor
) -> Tensor:
    """Standard deviation of (r - p) g, [m].

    right_square_m, wrong_square_m: E_1|g|^2, E_0|g|^2. mean_term_m: |E_1 g - E_0 g|^2, or what
    stands for it.
    """
    p = rate_m.double()
    square_m = p * (1 - p) ** 2 * right_square_m + p**2 * (1 - p) * wrong_square_m
    return (square_m - p**2 * (1 - p) ** 2 * mean_term_m).clamp(min=0).sqrt()


def posterior_mean(right_m: Tensor, wrong_m: Tensor) -> Tensor:
    """(a + 1) / (a + b + 2): finite without samples, and never 0 or 1."""
    return (right_m.double() + 1) / (right_m + wrong_m + 2)


def weights(stats: PilotStats, rate_m: Tensor, cfg: AllocationConfig) -> Tensor:
    """sigma of each prompt of the shard at accept rates `rate_m`, [m]. The norm of a class that the
    pilot has no sample of is that of the other one."""
    if cfg.grad_params == "none":
        ones_m = torch.ones_like(rate_m)
        return sigma(rate_m, ones_m, ones_m, torch.zeros_like(ones_m))
    has_right_m, has_wrong_m = stats.right_m > 0, stats.right_m < stats.num_samples_m
    right_m = torch.where(has_right_m, stats.right_square_m, stats.wrong_square_m)
    wrong_m = torch.where(has_wrong_m, stats.wrong_square_m, stats.right_square_m)
    if cfg.compat == "official":
        norm_1_m = torch.where(has_right_m, stats.right_norm_m, stats.wrong_norm_m)
        norm_0_m = torch.where(has_wrong_m, stats.wrong_norm_m, stats.right_norm_m)
        return sigma(rate_m, right_m, wrong_m, (norm_1_m - norm_0_m) ** 2)
    # |E_1 g - E_0 g| = |E_1 g| / (1 - p)
    return sigma(rate_m, right_m, wrong_m, stats.right_mean_square_m / (1 - rate_m) ** 2)


SOURCE = "Zeng et al. 2025, arXiv 2510.01037"

ALGORITHMS = (
    Algorithm(
        name="cures_grpo",
        summary="GRPO, with prompts and samples where there is most to learn.",
        source=SOURCE,
        defaults=grpo.ALGORITHM.defaults,
        paper_settings={"allocation.num_pilot_samples": 4, "num_minibatches": 4},
        allocator="cures",
    ),
    Algorithm(
        name="cures_reinforce_plus_plus",
        summary="REINFORCE++ with CurES's prompts and samples.",
        source=SOURCE,
        defaults=reinforce_plus_plus.ALGORITHM.defaults,
        paper_settings={"allocation.num_pilot_samples": 4, "num_minibatches": 4},
        aliases=("cures_reinforce++",),
        allocator="cures",
    ),
)
