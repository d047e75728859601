"""Correction for the gap between the engine that sampled and the trainer that learns.

With q_it = exp(logp_old - logp_rollout), detached, multiplied into the loss after clipping and
before the KL term (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"; masked: IcePop / MIS):

    token              w = q_it
    sequence           w_i = exp(sum_t m (logp_old - logp_rollout))
    sequence_geomean   w_i = exp(mean_t (logp_old - logp_rollout)); mode mask only
    seq_mask_tis       the token weights of the sequences whose geometric mean is inside the range

    truncate           clamp(w, rollout_is_min, rollout_is_max)
    mask               w inside [rollout_is_min, rollout_is_max], 0 outside

Token weights are biased with low variance, sequence weights the other way round.
Effective sample size: ESS = (sum w)^2 / sum w^2 / n, 1 when all weights are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.algos.kl import MAX_LOG_RATIO

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


@dataclass(frozen=True, slots=True)
class Correction:
    """`weight` as applied and `raw` before truncation or masking, [B, T], or [B, 1] per sequence;
    `unit` (bool, same shape) marks the entries that exist."""

    weight: Tensor
    raw: Tensor
    unit: Tensor


def correction(
    logp_old_BT: Tensor, logp_rollout_BT: Tensor, inside_BT: Tensor, cfg: AlgoConfig
) -> Correction:
    """Weights of one set of rows, detached, without batch normalisation.

    Log-probs may hold anything outside `inside_BT` (bool). For rollout_is=none the weights are the
    raw token ratios, for measuring only. Raises AlgoError for an unresolved `auto`.
    """
    level = cfg.mismatch.rollout_is or "none"
    if level == "auto":
        raise AlgoError(
            "algo.mismatch.rollout_is=auto is not resolved; call rlalign.algos.resolve with "
            "engine_shares_parameters"
        )
    gap_BT = torch.where(inside_BT, logp_old_BT - logp_rollout_BT, 0.0).detach()
    token_BT = _exp(gap_BT)
    if level == "none":
        return Correction(token_BT, token_BT, inside_BT)
    if level == "token":
        return Correction(_bounded(token_BT, cfg), token_BT, inside_BT)
    unit_B1 = inside_BT.any(1, keepdim=True)
    total_B1 = gap_BT.sum(1, keepdim=True)
    if level == "sequence":
        raw_B1 = _exp(total_B1)
        return Correction(_bounded(raw_B1, cfg), raw_B1, unit_B1)
    geomean_B1 = _exp(total_B1 / inside_BT.sum(1, keepdim=True).clamp(min=1))
    if level == "sequence_geomean":
        kept_B1 = torch.where(_inside_range(geomean_B1, cfg), geomean_B1, 0.0)
        return Correction(kept_B1, geomean_B1, unit_B1)
    if level == "seq_mask_tis":
        kept_BT = torch.where(_inside_range(geomean_B1, cfg), _bounded(token_BT, cfg), 0.0)
        return Correction(kept_BT, token_BT, inside_BT)
    raise AlgoError(f"algo.mismatch.rollout_is={level!r} is not a level of correction")


def rollout_weights(
    logp_old_BT: Tensor,
    logp_rollout_BT: Tensor,
    mask_BT: Tensor,
    cfg: AlgoConfig,
    *,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The weights to put into `TrainBatch.rollout_is_weight_BT`, [B, T], 0 outside the mask.

    Needed only with `rollout_is_batch_normalize`, whose mean runs over the whole optimizer batch;
    otherwise `policy_loss` computes the same weights row by row. all_reduce: sums a tensor over
    processes, each of which gives its own rows; None: all rows are here.
    """
    inside_BT = mask_BT.bool()
    found = correction(logp_old_BT, logp_rollout_BT, inside_BT, cfg)
    weight = torch.where(found.unit, found.weight, 0.0)
    if cfg.mismatch.rollout_is_batch_normalize:
        sums = torch.stack([weight.sum(), found.unit.sum().to(weight.dtype)])
        total, count = (all_reduce(sums) if all_reduce else sums).unbind()
        mean = total / count.clamp(min=1)
        weight = torch.where(mean > 0, weight / mean, weight)
    return torch.where(inside_BT, weight.expand(inside_BT.shape), 0.0)


def mismatch_metrics(
    found: Correction, logp_old_BT: Tensor, logp_rollout_BT: Tensor, inside_BT: Tensor
) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """How far engine and trainer are apart, as additive metrics (see algos/metrics.py).

    `mean_square` together with `mean` gives the effective sample size.
    """
    gap = (logp_old_BT - logp_rollout_BT).detach()[inside_BT].abs()
    weight, raw = found.weight[found.unit], found.raw[found.unit]
    count = torch.tensor(float(weight.numel()))
    ratio = "sampling/importance_sampling_ratio"
    metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {
        "sampling/logp_diff/mean": (gap.sum(), torch.tensor(float(gap.numel()))),
        f"{ratio}/mean": (weight.sum(), count),
        f"{ratio}/mean_square": (weight.square().sum(), count),
        f"{ratio}/bounded": ((weight != raw).sum().float(), count),
    }
    if weight.numel():
        metrics["sampling/logp_diff/max"] = gap.max()
        metrics[f"{ratio}/min"] = weight.min()
        metrics[f"{ratio}/max"] = weight.max()
    return metrics


def _exp(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _inside_range(weight: Tensor, cfg: AlgoConfig) -> Tensor:
    return (weight >= cfg.mismatch.rollout_is_min) & (weight <= cfg.mismatch.rollout_is_max)


def _bounded(weight: Tensor, cfg: AlgoConfig) -> Tensor:
    if cfg.mismatch.rollout_is_mode == "mask":
        return torch.where(_inside_range(weight, cfg), weight, 0.0)
    return weight.clamp(cfg.mismatch.rollout_is_min, cfg.mismatch.rollout_is_max)
