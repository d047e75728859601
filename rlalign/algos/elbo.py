"""Losses of estimated log-probs: what the trainer of a diffusion language model differentiates.

An estimate is a weighted sum of the log-probs of masked tokens over passes of the model,

    logp_t = sum_j w_jt log p(token t | what pass j does not mask)

so any loss of log-probs is one of those, and its gradient is

    sum_j sum_t (d loss / d log p_jt) grad log p_jt

With the slopes known, one pass at a time goes forward and backward: the memory is that of one,
however many there are, and the gradient is exact. The slopes take a first run without gradients,
unless they depend on no value, as in the first step after a rollout (`slopes_need_values`), or the
loss is a sum over passes (`Algorithm.pass_loss`: BGPO's bound).

Legend: B rows, J passes, T completion tokens, M passes of any rows, one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.metrics import Metrics
from rlalign.types import Masks, TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


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


def estimate_metrics(logp_BJT: Tensor, batch: TrainBatch) -> Metrics:
    """Figures of the estimates themselves (detached): the bound per token, and the standard error
    that the passes leave in it, nats per completion."""
    assert batch.masks is not None
    pass_BJ = pass_estimates(logp_BJT, batch.masks).double()
    counts_B = (batch.mask_BT.sum(1) > 0) & (num_passes(batch.masks) > 0).to(logp_BJT.device)
    rows = counts_B.sum().double()
    tokens = batch.mask_BT[counts_B].sum().double()
    figures = {"elbo/per_token": (pass_BJ.mean(1)[counts_B].sum(), tokens)}
    if pass_BJ.shape[1] > 1:
        error_B = pass_BJ.std(1) / pass_BJ.shape[1] ** 0.5
        figures["elbo/std_error"] = (error_B[counts_B].sum(), rows)
    return figures
