"""What CoPG's groups look like, as additive metrics (algos/metrics.py).

Means over groups of two or more, unless said otherwise:

    copg/loss                mean over all groups, by their weights
    copg/reg_reward_std      sd of a = R - beta rho; 0 when the policy fits the data
    copg/fit_r2              1 - sum (a - mean)^2 / sum (R - mean)^2, without tied groups: 0 at the
                             reference, 1 when fitted, below 0 past the mark (rate too high)
    copg/accuracy            share of pairs that rho ranks as R does; rho equal counts half
    copg/kl_data             mean of rho over the data, nats; the KL only if pi sampled them
    copg/logratio_std        sd of rho, nats
    copg/logratio_abs/max    largest |rho|, nats
    copg/beta_logratio_span  beta (max rho - min rho), which approaches ...
    copg/score_span          ... max R - min R
    groups/singleton         share of all groups that have nothing to compare
    groups/tied              share whose scores are all equal

Legend: N rows, G groups, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.algos.copg_rows import Rows
from rlalign.algos.segments import same_group_pairs, segment_extreme


@torch.no_grad()
def copg_metrics(
    rows: Rows, a_N: Tensor, beta: float, loss_G: Tensor, weight_G: Tensor
) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """The metrics above; a_N: centred in its group, 0 where not valid; loss_G, weight_G: of each
    group."""
    several_G = rows.size_G > 1
    scored_G = several_G & ~rows.tied_G
    score_N, rho_N = rows.centred(rows.score_N), rows.rho_N.detach()
    logratio_N = rows.logratio_N.detach()
    misfit_G, spread_G = rows.sum_G(a_N**2), rows.sum_G(score_N**2)
    freedom_G = (rows.size_G - 1).clamp(min=1)
    logratio_std_G = (rows.sum_G(rows.centred(logratio_N) ** 2) / freedom_G).sqrt()
    zero = a_N.new_zeros(1)

    def mean(value_G: Tensor, over_G: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(over_G, value_G, zero).sum(), over_G.sum().to(a_N.dtype)

    return {
        "copg/loss": ((weight_G * loss_G).sum(), weight_G.sum()),
        "copg/reg_reward_std": mean((misfit_G / freedom_G).sqrt(), several_G),
        "copg/fit_r2": mean(1 - misfit_G / spread_G, scored_G),
        "copg/accuracy": _accuracy(rows, score_N, rho_N),
        "copg/kl_data": (logratio_N.sum(), rows.valid_N.sum().to(a_N.dtype)),
        "copg/logratio_std": mean(logratio_std_G, several_G),
        "copg/logratio_abs/max": torch.cat((logratio_N.abs(), zero)).max(),
        "copg/beta_logratio_span": mean(beta * _span(rho_N, rows), several_G),
        "copg/score_span": mean(_span(rows.score_N, rows), several_G),
        "groups/singleton": mean((rows.peers_G == 0).to(a_N.dtype), rows.size_G >= 0),
        "groups/tied": mean(rows.tied_G.to(a_N.dtype), several_G),
    }


def _accuracy(rows: Rows, score_N: Tensor, rho_N: Tensor) -> tuple[Tensor, Tensor]:
    i_P, j_P = same_group_pairs(rows.index_N)
    score_P = (score_N[i_P] - score_N[j_P]).sign()
    rho_P = (rho_N[i_P] - rho_N[j_P]).sign()
    ranked_P = rows.valid_N[i_P] & rows.valid_N[j_P] & (score_P != 0)
    right_P = torch.where(ranked_P, (score_P * rho_P + 1) / 2, torch.zeros_like(score_P))
    return right_P.sum(), ranked_P.sum().to(score_N.dtype)


def _span(value_N: Tensor, rows: Rows) -> Tensor:
    extremes = (
        segment_extreme(value_N, rows.valid_N, rows.index_N, rows.num_groups, reduce)
        for reduce in ("amax", "amin")
    )
    high_G, low_G = extremes
    return high_G - low_G
