"""Losses of estimated log-probs: what the trainer of a diffusion language model differentiates.

An estimate is a weighted sum of the log-probs of masked tokens over passes of the model,

    logp_t = sum_j w_jt log p(token t | what pass j does not mask)

so any loss of log-probs is one of those, and its gradient is

    sum_j sum_t (d loss / d log p_jt) grad log p_jt

With the slopes known, one pass at a time goes forward and backward: the memory is that of one,
however many there are, and the gradient is exact. The slopes take a first run without gradients,
unless they depend on no value, as in the first step after a rollout (`slopes_need_values`), or the
loss is a sum over passes (`Algorithm.pass_loss`: BGPO's bound).

With the estimate ell = sum_t logp_t of a completion and N from `likelihood.norm`, the loss of a
ratio per completion (`sequence_loss`) is

    rho_i = exp((ell_i - ell_i_old) / N_i)
    loss = sum_i w_i [ l(rho_i, A_i) + beta (ell_i - ell_i_ref)^2 / (2 N_i) ]

with w the rows' shares of the batch and l as in surrogate.py.

Legend: B rows, J passes, T completion tokens, M passes of any rows, one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.kl import MAX_LOG_RATIO
from rlalign.algos.loss import Figures, LossOutput
from rlalign.algos.metrics import Metrics
from rlalign.algos.surrogate import Clipped, surrogate
from rlalign.types import Masks, TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

BOUND = ("bernoulli", "count", "count_strat", "count_anti", "coupled")  # estimators of the bound


def combine(logp_BJT: Tensor, masks: Masks) -> Tensor:
    """The estimate of each token's log-prob: [B, T], 0 where nothing is scored."""
    weight_BJT = masks.weight_BJT.to(logp_BJT.device)
    return torch.where(weight_BJT != 0, weight_BJT * logp_BJT, 0.0).sum(1)


def pass_estimates(logp_BJT: Tensor, masks: Masks) -> Tensor:
    """What each pass alone says of the whole completion: [B, J]; their mean is `combine`'s sum."""
    weight_BJT = masks.weight_BJT.to(logp_BJT.device)
    scored_BJT = torch.where(weight_BJT != 0, weight_BJT * logp_BJT, 0.0)
    return scored_BJT.sum(2) * num_passes(masks).to(logp_BJT.device)[:, None]


def num_passes(masks: Masks) -> Tensor:
    """Passes of each row that count, those that happen to mask nothing among them: [B]."""
    return (masks.weight_BJT != 0).any(2).any(1).long() * masks.weight_BJT.shape[1]


def row_weight(batch: TrainBatch) -> Tensor:
    """Each row's share of the loss: [B]."""
    assert batch.weight_BT is not None
    return batch.weight_BT.sum(1)


def policy_weight(batch: TrainBatch) -> Tensor:
    """Each row's share of the policy's term, which RAFT averages over what it accepts: [B]."""
    weight_BT = batch.policy_weight_BT
    return row_weight(batch) if weight_BT is None else weight_BT.sum(1)


def row_advantage(batch: TrainBatch) -> Tensor:
    """Each row's advantage, the mean over its tokens where they differ: [B]."""
    assert batch.weight_BT is not None and batch.advantage_BT is not None
    total_B = row_weight(batch)
    sum_B = (batch.weight_BT * batch.advantage_BT).sum(1)
    return torch.where(total_B > 0, sum_B / torch.where(total_B > 0, total_B, 1.0), 0.0)


def ratio_divisor(batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int) -> Tensor:
    """What `likelihood.norm` divides the estimate of a completion by: [B], at least 1."""
    length_B = batch.mask_BT.sum(1).clamp(min=1)
    if cfg.likelihood.norm == "valid":
        return length_B
    return torch.full_like(
        length_B, 1.0 if cfg.likelihood.norm == "none" else max_completion_length
    )


def pass_changes(
    logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int
) -> Tensor:
    """(ell_j - ell_j_old) / N of every pass: [B, J], with the gradient of `logp_BJT`."""
    assert batch.masks is not None
    old_BJT = logp_BJT.detach() if batch.logp_old_BJT is None else batch.logp_old_BJT
    change_BJ = pass_estimates(logp_BJT - old_BJT, batch.masks)
    return change_BJ / ratio_divisor(batch, cfg, max_completion_length)[:, None]


def sequence_loss(
    logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int
) -> LossOutput:
    """The loss of one ratio per completion, of all passes at once (see above). The reference's
    estimates are `logp_ref_BT`, needed where beta > 0."""
    assert batch.masks is not None
    change_B = pass_changes(logp_BJT, batch, cfg, max_completion_length).mean(1)
    ratio_B = change_B.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss_B, clipped = surrogate(ratio_B, row_advantage(batch), change_B, cfg)
    loss = (policy_weight(batch) * loss_B).sum()
    counts_B = num_passes(batch.masks).to(loss_B.device) > 0
    metrics = change_metrics(
        change_B[counts_B], ratio_B[counts_B], {k: v[counts_B] for k, v in clipped.items()}
    )
    if cfg.beta:
        gap_B = reference_gap(logp_BJT, batch)
        kl_B = gap_B**2 / (2 * ratio_divisor(batch, cfg, max_completion_length))
        loss = loss + cfg.beta * (row_weight(batch) * kl_B).sum()
        metrics["kl"] = (kl_B.detach()[counts_B].sum(), counts_B.sum().to(kl_B.dtype))
    return LossOutput(loss, metrics)


def reference_gap(logp_BJT: Tensor, batch: TrainBatch) -> Tensor:
    """ell - ell_ref of each completion under the same masks: [B]. Differences come before sums:
    one is of order 1, the others may be of order 1000."""
    assert batch.masks is not None and batch.logp_ref_BT is not None
    return (combine(logp_BJT, batch.masks) - batch.logp_ref_BT).sum(1)


def change_metrics(change_M: Tensor, ratio_M: Tensor, clipped: Clipped) -> Figures:
    """Figures of ratios, of single passes or of completions, detached."""
    change_M, ratio_M = change_M.detach(), ratio_M.detach()
    count = torch.tensor(float(len(change_M)))
    metrics: Figures = {
        f"clip_ratio/{name}": (where_M.sum().float(), count) for name, where_M in clipped.items()
    }
    metrics["elbo/change"] = (change_M.abs().sum(), count)
    metrics["elbo/negative_ratio"] = ((ratio_M < 0).sum().float(), count)
    if len(change_M):
        metrics["elbo/change/max"] = change_M.max()
    return metrics


def estimate_metrics(pass_BJ: Tensor, batch: TrainBatch, estimator: str | None) -> Metrics:
    """Figures of the estimates themselves (`pass_estimates`, detached): the estimate per token and,
    of those of the bound, the standard error that the passes leave in it, nats per completion. It
    is that of independent passes: passes that are spread or paired leave less."""
    assert batch.masks is not None
    pass_BJ = pass_BJ.double()
    counts_B = (batch.mask_BT.sum(1) > 0) & (num_passes(batch.masks) > 0).to(pass_BJ.device)
    rows = counts_B.sum().double()
    tokens = batch.mask_BT[counts_B].sum().double()
    figures = {}
    if estimator != "block_noise":  # whose passes have means
        figures["elbo/per_token"] = (pass_BJ.mean(1)[counts_B].sum(), tokens)
    if estimator in BOUND and pass_BJ.shape[1] > 1:
        error_B = pass_BJ.std(1) / pass_BJ.shape[1] ** 0.5
        figures["elbo/std_error"] = (error_B[counts_B].sum(), rows)
    return figures
