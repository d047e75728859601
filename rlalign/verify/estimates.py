"""Properties of estimated log-probs: the bound and its estimators, the sampler's own masks, and
BGPO's bound of its objective.

Legend: N random cases, J passes, M passes of any of them, T tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from rlalign import algos
from rlalign.algos.bgpo import pass_loss
from rlalign.config import AlgoConfig
from rlalign.verify import elbo_reference as reference
from rlalign.verify.cases import config, difference, worst
from rlalign.verify.table import shared

BGPO = "arXiv 2510.11683"
LLADA = "arXiv 2502.09992"
PASSES = 4
RANDOM_CASES = 10_000


@shared("the bound of a table model: 64 masks = 720 orders", source=LLADA, bound=1e-12)
def orders() -> float:
    generator = torch.Generator().manual_seed(0)
    length, total = 6, 0.0
    table = {
        hidden: (-3 * torch.rand(length, generator=generator, dtype=torch.float64)).tolist()
        for hidden in itertools.product((False, True), repeat=length)
    }
    for hidden, logp in table.items():
        count = sum(hidden)
        if count:
            weight = length / count / (length * math.comb(length, count))
            total += weight * sum(itertools.compress(logp, hidden))
    return abs(total - reference.order_mean(table))


@shared("count_strat: every number of masked tokens equally often", source=BGPO, bound=0.0)
def uniform_counts() -> float:
    """For each length, over as many seeds as give every start: the counts of a start follow from
    it, and all starts together have each number equally often."""
    errors = []
    for length, passes in itertools.product((1, 3, 8, 24), (1, 2, 16)):
        cfg = config("bgpo").likelihood
        cfg = dataclasses.replace(cfg, estimator="count_strat", num_mc_samples=passes)
        by_start: dict[int, list[int]] = {}
        for first in range(0, 40_000, 400):
            valid_BT = torch.ones(400, length, dtype=torch.bool)
            masks = algos.draw_masks(valid_BT, [1] * 400, range(first, first + 400), cfg)
            for row in masks.hidden_BJT.sum(2).tolist():
                by_start.setdefault(row[0], row)
            if len(by_start) == length:
                break
        drawn = [count for row in by_start.values() for count in row]
        errors += [abs(drawn.count(k) - passes) for k in range(1, length + 1)]
    return worst(errors)


@shared("trace: the sum is the log-prob of the sampler's choices", source="arXiv 2509.06949",
        bound=1e-12)  # fmt: skip
def traced() -> float:
    generator = torch.Generator().manual_seed(1)
    length, cfg = 6, dataclasses.replace(config("tracerl").likelihood, shrink=1)
    step_BT = torch.tensor([[2, 0, 1, 1, 3, 0], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]])
    errors = []
    masks = algos.draw_masks(
        torch.ones_like(step_BT).bool(), [1] * 3, [0] * 3, cfg, step_BT=step_BT
    )
    table = {
        hidden: (-3 * torch.rand(length, generator=generator, dtype=torch.float64)).tolist()
        for hidden in itertools.product((False, True), repeat=length)
    }
    for b, steps in enumerate(step_BT.tolist()):
        chosen = 0.0
        for t, step in enumerate(steps):
            chosen += table[tuple(other >= step for other in steps)][t]
        rows = [table[tuple(hidden)] for hidden in masks.hidden_BJT[b].tolist()]
        logp_JT = torch.tensor(rows, dtype=torch.float64)
        errors.append(abs(float((masks.weight_BJT[b] * logp_JT).sum()) - chosen))
    return worst(errors)


def random_changes() -> tuple[Tensor, Tensor]:
    """d of 1 to 8 passes and an advantage each, of all scales: [N, 8] with NaN beyond, [N]."""
    generator = torch.Generator().manual_seed(2)
    shape = (RANDOM_CASES, 8)
    d_NJ = torch.randn(shape, generator=generator, dtype=torch.float64)
    d_NJ = d_NJ * torch.logspace(-3, 0.7, RANDOM_CASES, dtype=torch.float64)[:, None]
    count_N = torch.randint(1, 9, (RANDOM_CASES,), generator=generator)
    d_NJ = d_NJ.clamp(-19, 19).masked_fill(torch.arange(8) >= count_N[:, None], math.nan)
    advantage_N = torch.randn(RANDOM_CASES, generator=generator, dtype=torch.float64)
    return d_NJ, advantage_N


FORMS = (("bound", False), ("bound", True), ("quadratic", False), ("quadratic", True))


def bound_config(surrogate: str, clip: bool) -> AlgoConfig:
    cfg = config("bgpo", policy_loss="ppo_clip" if clip else "unclipped")
    likelihood = dataclasses.replace(cfg.likelihood, surrogate=surrogate)
    return dataclasses.replace(cfg, likelihood=likelihood)


@shared(
    "bgpo: the bound is one on 10,000 random cases, clipped too, and as in loops",
    source=BGPO,
    bound=1e-9,
)
def bounds() -> float:
    d_NJ, advantage_N = random_changes()
    used_NJ = ~d_NJ.isnan()
    d_M, advantage_M = d_NJ[used_NJ], advantage_N[:, None].expand(used_NJ.shape)[used_NJ]
    errors = []
    for surrogate, clip in FORMS:
        loss_NJ = torch.zeros_like(d_NJ)
        loss_NJ[used_NJ] = _of_each(d_M, advantage_M, bound_config(surrogate, clip))
        ours = (-loss_NJ.sum(1) / used_NJ.sum(1)).tolist()
        width, quadratic = (0.2, 0.2) if clip else None, surrogate == "quadratic"
        for row, used, advantage, our in zip(
            d_NJ.tolist(), used_NJ.sum(1).tolist(), advantage_N.tolist(), ours, strict=True
        ):
            d = row[:used]
            theirs = reference.bound(d, advantage, width, quadratic=quadratic)
            scale = max(1.0, abs(theirs))
            above = our - reference.objective(d, advantage, width)
            errors += [abs(our - theirs) / scale, max(0.0, above) / scale]
    return worst(errors)


def _of_each(d_M: Tensor, advantage_M: Tensor, cfg: AlgoConfig) -> Tensor:
    """The shipped loss of every pass: the derivative of its sum in the weights."""
    weight_M = torch.ones_like(d_M, requires_grad=True)
    (loss_M,) = torch.autograd.grad(pass_loss(d_M, advantage_M, weight_M, cfg).loss, weight_M)
    return loss_M


@shared("bgpo: at the policy that sampled, value and slopes are the objective's", source=BGPO,
        bound=1e-12)  # fmt: skip
def at_the_start() -> float:
    errors = []
    for (surrogate, clip), advantage in itertools.product(FORMS, (1.3, -0.7, 0.0)):
        d_J = torch.zeros(PASSES, dtype=torch.float64, requires_grad=True)
        weight_J = torch.full((PASSES,), 1 / PASSES, dtype=torch.float64)
        advantage_J = torch.full((PASSES,), advantage, dtype=torch.float64)
        loss = pass_loss(d_J, advantage_J, weight_J, bound_config(surrogate, clip)).loss
        (slope_J,) = torch.autograd.grad(loss, d_J)
        errors += [abs(float(loss.detach()) + advantage), difference(slope_J, -advantage / PASSES)]
    return worst(errors)


@shared("bgpo: exact for one pass and A < 0; for A >= 0 the objective's direction", source=BGPO,
        bound=1e-12)  # fmt: skip
def directions() -> float:
    errors, cfg = [], bound_config("bound", False)
    for change in (-3.0, -0.2, 0.4, 2.5):
        d = torch.tensor([change], dtype=torch.float64)
        ours = -float(pass_loss(d, torch.tensor([-0.7]).double(), torch.ones(1), cfg).loss)
        exact = reference.objective([change], float(torch.tensor(-0.7).double()))
        errors.append(abs(ours - exact) / max(1.0, abs(exact)))
        d_J = torch.tensor([change, 1.0, -0.5], dtype=torch.float64, requires_grad=True)
        weight_J = torch.full((3,), 1 / 3, dtype=torch.float64)
        loss = pass_loss(d_J, torch.ones(3, dtype=torch.float64), weight_J, cfg).loss
        (slope_J,) = torch.autograd.grad(loss, d_J)
        errors.append(difference(slope_J, -1 / 3))  # equal for all passes, as exp(mean d)/3 is
    return worst(errors)
