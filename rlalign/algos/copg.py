"""CoPG: contrastive policy gradient, for scored completions from anywhere.

With the log-ratio rho = log pi(y) - log pi_ref(y), summed over the completion, and the regularised
reward a = R - beta rho, two completions of one prompt cost

    L_ij = (a_i - a_j)^2 / (2 beta),  dL_ij = -(a_i - a_j) (d log pi(y_i) - d log pi(y_j))

and k of them half the mean over their pairs, s^2 / (2 beta) with s^2 the sample variance of a:

    dL = -1/k sum_i A_i d log pi(y_i),  A_i = a_i - 1/(k-1) sum_{j != i} a_j

This is RLOO's gradient with the KL in the reward, but it needs no samples of the policy: every pair
costs nothing at pi* ~ pi_ref exp(R / beta), so pi* minimises the loss whatever distribution the
completions come from, without its probabilities, ratios or clips. What makes that true is beta rho
in the baseline: off-policy, one of scores alone, or none, moves the optimum. Of completions that
are never seen, or never compared, nothing is learned (examples/copg_bandit.py shows all this).

Special cases: scores of +1/4 and -1/4 give IPO, (1/2 - beta (rho_1 - rho_2))^2 / (2 beta) under
scale=pair; completions sampled from pi give RLOO; beta=0 under loss_type=surrogate gives REINFORCE
with the leave-one-out baseline, of which nothing is claimed off-policy.
Flet-Berliac et al. 2024, arXiv 2406.19185 (pairs); Cohere 2025, arXiv 2504.00698 (groups).

Legend: N rows, one completion each; G groups, one prompt each; T completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.base import Algorithm
from rlalign.algos.copg_metrics import copg_metrics
from rlalign.algos.copg_rows import RowOptions, Rows, length_divisor, prepare
from rlalign.algos.errors import AlgoError
from rlalign.algos.loss import LossOutput
from rlalign.algos.segments import compact, same_group_pairs, segment_sum
from rlalign.types import TrainBatch

if TYPE_CHECKING:
    from typing import Unpack

    from rlalign.config.schema import AlgoConfig

LOSS_TYPES = ("square", "surrogate")
SCALES = ("rloo", "pair", "command_a")


@dataclass(frozen=True, slots=True)
class CoPGOutput:
    """`loss`: scalar with a graph. `advantage_N`: A_i, detached; 0 for a row without a peer.
    `metrics`: detached, additive (algos/metrics.py); copg_metrics.py says how to read them.

    >>> # R=(1, 0, .5), rho=(2, -1, .5), beta=.1: a=(.8, .1, .45), A=(.525, -.525, 0), loss=.6125
    """

    loss: Tensor
    advantage_N: Tensor
    metrics: dict[str, Tensor | tuple[Tensor, Tensor]]


def copg_loss(
    logp_N: Tensor,
    ref_logp_N: Tensor | None,
    score_N: Tensor,
    *,
    beta: float = 0.06,
    loss_type: str = "square",
    scale: str = "rloo",
    group_weight_N: Tensor | None = None,
    pair_weight_NN: Tensor | None = None,
    num_groups: float | None = None,
    skip_tied_groups: bool = False,
    **rows: Unpack[RowOptions],
) -> CoPGOutput:
    """Loss, advantages and metrics of whole groups: all of a batch, or those of one micro-batch.

    logp_N: log-probs of the completions, nats, summed over tokens, with graph. ref_logp_N: the
    same under the reference; None: `logp_N` is the log-ratio already (`sequence_logratio`).
    score_N: finite, any scale: only score / beta matters, and only its differences in a group.
    loss_type: square is L; surrogate has the same gradient and also takes beta=0. scale: rloo is
    L; pair sums over the pairs; command_a is k s^2. group_weight_N: the same >= 0 for all rows of
    a group; 2 counts it twice. pair_weight_NN: symmetric, >= 0, of each pair; entries between
    groups are not read. num_groups: what the sum over groups is divided by, so that the losses of
    micro-batches add up to that of their batch; None: the total weight of the groups given, which
    without weights is their number. skip_tied_groups: groups of equal scores, whose rho CoPG
    otherwise pulls together, contribute nothing (and still count). The rest: RowOptions.

    Sums and differences are taken in at least float32. A group without two comparable rows
    contributes nothing; AlgoError if `num_groups` is None and all are such. AlgoError for options
    and inputs that make no sense.
    """
    _check_options(beta, loss_type, scale, pair_weight_NN)
    found = prepare(logp_N, ref_logp_N, score_N, **rows)
    if num_groups is None:
        found.require_pairs()
    weight_G = found.group_weights(group_weight_N)
    total = float(weight_G.sum() if num_groups is None else num_groups)
    if not total > 0:
        raise AlgoError(f"the groups' losses cannot be divided by num_groups={total}; it is > 0")
    a_N = _regularised_reward(found, beta)
    advantage_N = _leave_one_out(a_N.detach(), found)
    if pair_weight_NN is not None:
        loss_G = _weighted_pairs(a_N, pair_weight_NN, found) / (2 * beta)
    else:
        factor_G = {"rloo": 1.0, "pair": found.peers_G, "command_a": 2 * beta * found.size_G}[scale]
        share_N = found.peers_N / found.peers_G.clamp(min=1)[found.index_N]  # 1/k, unless sources
        if loss_type == "square":
            loss_G = factor_G * _squares(a_N, share_N, found) / (2 * beta)
        else:
            loss_G = -factor_G * found.sum_G(share_N * advantage_N * found.logp_N)
    if skip_tied_groups:
        loss_G = loss_G * ~found.tied_G
    metrics = copg_metrics(found, a_N.detach(), beta, loss_G.detach(), weight_G)
    return CoPGOutput((weight_G * loss_G).sum() / total, advantage_N, metrics)


def copg_advantages(
    logp_N: Tensor,
    ref_logp_N: Tensor | None,
    score_N: Tensor,
    *,
    beta: float = 0.06,
    **rows: Unpack[RowOptions],
) -> Tensor:
    """A_i = a_i - mean of the a_j it is compared with, [N], detached, 0 for a row without a peer.

    For any policy-gradient trainer: its loss -1/k sum_i A_i log pi(y_i) has CoPG's gradient, as
    long as A is computed anew from the current log-probs at every optimizer step. Under a length
    normalisation log pi(y_i) is divided as rho is. Arguments and errors as for `copg_loss`.
    """
    found = prepare(logp_N.detach(), ref_logp_N, score_N, **rows)
    found.require_pairs()
    return _leave_one_out(_regularised_reward(found, beta), found)


def sequence_logratio(
    logp_BT: Tensor,
    logp_ref_BT: Tensor,
    mask_BT: Tensor,
    *,
    length_normalization: str = "none",
    max_completion_length: int | None = None,
) -> Tensor:
    """rho of each row from per-token log-probs: [B], at least float32, with the graph of `logp_BT`.

    Differences are taken per token before they are summed, because rho is a small difference of
    two sums of order 1e3. Where `mask_BT` is 0 (padding, tool output, user turns) anything may
    stand, NaN too. length_normalization: none, mean (over the tokens inside the mask) or const
    (over max_completion_length); a row without any token gets 0 and should not be `valid_N`.
    """
    inside_BT = mask_BT.bool()
    wide = torch.promote_types(logp_BT.dtype, torch.float32)
    zero_BT = torch.zeros(logp_BT.shape, dtype=wide, device=logp_BT.device)
    policy_BT = torch.where(inside_BT, logp_BT.to(wide), zero_BT)
    reference_BT = torch.where(inside_BT, logp_ref_BT.detach().to(wide), zero_BT)
    rho_B = (policy_BT - reference_BT).sum(1)
    length_B = inside_BT.sum(1)
    return rho_B / length_divisor(rho_B, length_normalization, length_B, max_completion_length)


def _regularised_reward(rows: Rows, beta: float) -> Tensor:
    """a_i minus its group mean. R and rho are centred apart: one is of order 1, the other may be
    of order 1e3, and the float32 mean of their sum would lose the smaller."""
    return rows.centred(rows.score_N) - beta * rows.centred(rows.rho_N)


def _leave_one_out(a_N: Tensor, rows: Rows) -> Tensor:
    """a_i minus the mean over the rows it is compared with."""
    others_N = (rows.sum_G(a_N)[rows.index_N] - rows.source_sum(a_N)) / rows.peers_N.clamp(min=1)
    return torch.where(rows.peers_N > 0, a_N - others_N, torch.zeros_like(a_N))


def _squares(a_N: Tensor, share_N: Tensor, rows: Rows) -> Tensor:
    """Half the mean of (a_i - a_j)^2 over the compared pairs of each group: [G].

    With k_s rows of i's source, their mean m_s, and the group mean 0, the sum over pairs is
    sum_i [(k - k_s) (a_i - m_s)^2 + k m_s^2], which has no differences that could cancel. Without
    sources each row is one (m_s = a_i), and k sum_i a_i^2 is left.
    """
    source_size_N = (rows.size_G[rows.index_N] - rows.peers_N).clamp(min=1)
    mean_N = rows.source_sum(a_N) / source_size_N
    between_N = rows.size_G[rows.index_N] / rows.peers_N.clamp(min=1) * mean_N**2
    return rows.sum_G(share_N * ((a_N - mean_N) ** 2 + between_N))


def _weighted_pairs(a_N: Tensor, pair_weight_NN: Tensor, rows: Rows) -> Tensor:
    """Sum of w_ij (a_i - a_j)^2 over the compared pairs of each group: [G]."""
    expected = (len(a_N), len(a_N))
    if tuple(pair_weight_NN.shape) != expected:
        raise AlgoError(
            f"pair_weight_NN has shape {tuple(pair_weight_NN.shape)} for {len(a_N)} rows; give one "
            f"weight for each two rows, {expected}"
        )
    i_P, j_P = same_group_pairs(rows.index_N)
    compared_P = rows.valid_N[i_P] & rows.valid_N[j_P] & (rows.source_N[i_P] != rows.source_N[j_P])
    i_P, j_P = i_P[compared_P], j_P[compared_P]
    weight_P = pair_weight_NN[i_P, j_P].to(a_N.dtype)
    usable_P = (weight_P >= 0) & weight_P.isfinite() & (pair_weight_NN[j_P, i_P] == weight_P)
    if not bool(usable_P.all()):
        raise AlgoError(
            f"pair_weight_NN of rows {int(i_P[~usable_P][0])} and {int(j_P[~usable_P][0])} is "
            "negative, not finite or not symmetric; any other weights keep the optimum"
        )
    square_P = weight_P * (a_N[i_P] - a_N[j_P]) ** 2
    return segment_sum(square_P, rows.index_N[i_P], rows.num_groups)


def _check_options(beta: float, loss_type: str, scale: str, pair_weight_NN: Tensor | None) -> None:
    for name, value, choices in (("loss_type", loss_type, LOSS_TYPES), ("scale", scale, SCALES)):
        if value not in choices:
            raise AlgoError(f"algo.copg.{name}={value!r} is none of {', '.join(choices)}")
    if not beta >= 0:
        raise AlgoError(f"algo.beta={beta} must be >= 0; CoPG's paper finds 0.03 to 0.1 good")
    if beta == 0 and (loss_type == "square" or scale == "command_a"):
        raise AlgoError(
            f"algo.beta=0 with algo.copg.loss_type={loss_type}, algo.copg.scale={scale}: the loss "
            "is divided by or proportional to beta; beta must be > 0, or use loss_type=surrogate "
            "with scale=rloo or pair"
        )
    if pair_weight_NN is not None and (loss_type, scale) != ("square", "pair"):
        raise AlgoError(
            f"pair weights with algo.copg.loss_type={loss_type}, algo.copg.scale={scale}: they "
            "weigh a sum over pairs; use loss_type=square with scale=pair"
        )


def batch_loss(
    logp_BT: Tensor, batch: TrainBatch, cfg: AlgoConfig, *, entropy_BT: Tensor | None = None
) -> LossOutput:
    """`copg_loss` of the whole groups in `batch`, as a trainer calls it (algos/base.py).

    A group's share of the loss is the sum over its rows of their weights, which were fixed on the
    whole optimizer batch. Rows without a token inside the mask (truncated, not scorable) are left
    out of their groups. Without a reference (beta 0) rho is the log-prob itself.
    """
    if batch.weight_BT is None or (cfg.beta and batch.logp_ref_BT is None):
        raise AlgoError("CoPG needs weight_BT and, where beta > 0, logp_ref_BT in the batch")
    valid_B = batch.mask_BT.bool().any(1) & batch.reward_B.isfinite()
    ref_BT = torch.zeros_like(logp_BT) if batch.logp_ref_BT is None else batch.logp_ref_BT
    max_length, section = int(cfg.loss_scale_factor or 0) or None, cfg.copg
    rho_B = sequence_logratio(
        logp_BT,
        ref_BT,
        batch.mask_BT,
        length_normalization=section.length_normalization,
        max_completion_length=max_length,
    )
    index_B, num_groups = compact(batch.group_id_B)
    # A process without rows for this micro-batch has no columns either.
    share_B = batch.weight_BT.amax(1) if len(batch) else batch.weight_BT.sum(1)
    share_G = segment_sum(share_B, index_B, num_groups)
    found = copg_loss(
        rho_B,
        None,
        torch.where(valid_B, batch.reward_B, 0.0),
        beta=cfg.beta or 0.0,
        loss_type=section.loss_type,
        scale=section.scale,
        group_weight_N=share_G[index_B],
        num_groups=1.0,
        skip_tied_groups=section.skip_tied_groups,
        group_id_N=batch.group_id_B,
        valid_N=valid_B,
        source_id_N=batch.source_id_B if section.compare_sources else None,
        tie_tol=cfg.reward_tie_tol,
    )
    measured = {} if entropy_BT is None else entropy_metric(entropy_BT, batch)
    return LossOutput(found.loss, found.metrics | measured)


def entropy_metric(entropy_BT: Tensor, batch: TrainBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Its mean over the tokens inside the mask, additive."""
    inside_BT = batch.mask_BT.bool()
    total = torch.where(inside_BT, entropy_BT.detach(), 0.0).sum()
    return {"entropy": (total, inside_BT.sum().to(total.dtype))}


ALGORITHM = Algorithm(
    name="copg",
    summary="Regression of score differences on log-ratio differences: any completions do.",
    source="Flet-Berliac et al. 2024, arXiv 2406.19185",
    defaults={
        "adv_estimator": "rloo",  # what the sample table shows; the loss has its own
        "scale_rewards": "none",
        "policy_loss": "reinforce",
        "loss_agg_mode": "seq-mean-token-sum",
        "prompt_weighting": "prompt",
        "beta": 0.06,
        "kl_in": "loss",
        "kl_estimator": "k2",
    },
    paper_settings={"num_generations": 2, "trainer.optim.learning_rate": 1e-6},
    loss=batch_loss,
    couples_rows=True,
)
