"""Properties of CoPG: its identities, and that its optimum does not depend on the data."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rlalign.algos.copg import copg_advantages, copg_loss
from rlalign.verify import reference
from rlalign.verify.cases import config, difference, worst
from rlalign.verify.credit import one_token
from rlalign.verify.table import shared

COPG = "Flet-Berliac et al. 2024, arXiv 2406.19185"
GROUPS = "Cohere 2025, arXiv 2504.00698"
BETA = 0.3
GROUP_ID = [7, 3, 90, 3, 7, 90, 7, 11, 7, 90, 7]  # sizes 1, 2, 3 and 5


def random_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Log-ratios and scores of eleven completions."""
    generator = torch.Generator().manual_seed(seed)
    rho_N, score_N = torch.randn(2, 11, generator=generator, dtype=torch.float64)
    return 3 * rho_N, score_N


def value_and_slope(rho_N: Tensor, score_N: Tensor, **options) -> tuple[float, Tensor]:
    """The shipped loss and its derivative in each log-prob."""
    leaf_N = rho_N.clone().requires_grad_(True)
    options = {"group_id_N": torch.tensor(GROUP_ID), "beta": BETA, **options}
    loss = copg_loss(leaf_N, None, score_N, **options).loss
    (slope_N,) = torch.autograd.grad(loss, leaf_N)
    return float(loss.detach()), slope_N


@shared("copg: loss and gradient = the sum over pairs in loops", source=COPG, bound=1e-10)
def pairs() -> float:
    errors = []
    for seed, scale in itertools.product(range(3), ("rloo", "pair", "command_a")):
        rho_N, score_N = random_rows(seed)
        loss, slope = reference.copg(rho_N.tolist(), score_N.tolist(), GROUP_ID, BETA, scale)
        for loss_type in ("square", "surrogate"):
            ours, ours_N = value_and_slope(rho_N, score_N, loss_type=loss_type, scale=scale)
            errors.append(difference(ours_N, slope))
            if loss_type == "square":
                errors.append(abs(ours - loss))
    return worst(errors)


@shared("copg: the gradient of RLOO with the KL in the reward", source=GROUPS, bound=1e-12)
def leave_one_out() -> float:
    rho_N, score_N = random_rows(0)
    _, slope_N = value_and_slope(rho_N, score_N)
    advantage_N = one_token(score_N - BETA * rho_N, GROUP_ID, config("rloo", beta=0.0))
    size_N = torch.tensor([GROUP_ID.count(label) for label in GROUP_ID])
    return difference(slope_N, -advantage_N / size_N / len(set(GROUP_ID)))


@shared("copg: at pi* no pair pulls, whatever the data are", source=COPG, bound=1e-12)
def optimum() -> float:
    errors = []
    for seed in range(3):
        _, score_N = random_rows(seed)
        constant_N = torch.tensor([float(label) for label in GROUP_ID], dtype=torch.float64)
        best_N = score_N / BETA - constant_N
        options = {"group_id_N": torch.tensor(GROUP_ID), "beta": BETA}
        errors.append(difference(copg_advantages(best_N, None, score_N, **options), 0.0))
    return worst(errors)


@shared("copg: scores of +-1/4 give IPO / (2 beta)", source="Azar et al. 2023", bound=1e-12)
def preferences() -> float:
    rho_N, _ = random_rows(1)
    rho_N, score_N = rho_N[:10], torch.tensor([0.25, -0.25] * 5, dtype=torch.float64)
    loss, slope_N = value_and_slope(
        rho_N, score_N, group_id_N=None, num_generations=2, scale="pair"
    )
    miss = 0.5 - BETA * (rho_N[0::2] - rho_N[1::2])
    expected = torch.stack([-miss, miss], dim=1).flatten() / 5
    return worst([abs(loss - float((miss**2).mean()) / (2 * BETA)), difference(slope_N, expected)])


@shared("copg: micro-batches of whole groups add up", source="a sum over groups", bound=1e-12)
def split() -> float:
    rho_N, score_N = random_rows(2)
    loss, slope_N = value_and_slope(rho_N, score_N)
    parts = ([1, 3, 7], [10, 8, 6, 4, 0], [2, 5, 9])
    total, parts_N = 0.0, torch.zeros_like(slope_N)
    for rows in parts:
        group_id_N = torch.tensor(GROUP_ID)[rows]
        part, parts_N[rows] = value_and_slope(
            rho_N[rows], score_N[rows], group_id_N=group_id_N, num_groups=4
        )
        total += part
    return worst([abs(total - loss), difference(parts_N, slope_N)])
