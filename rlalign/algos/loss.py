"""The policy loss of one micro-batch: a weighted sum of token losses.

    loss = sum_it w'_it q_it l_it + w_it [ beta kl_it - entropy_coef H_it ]

w: shares of the global batch (aggregate.py); w': those of the policy's term, w unless RAFT averages
over what it accepts. l: surrogate of ratio and advantage (surrogate.py,
ratio.py). q: engine/trainer correction (mismatch.py). kl: estimator (kl.py), when `kl_in=loss`.

Tokens outside the mask are replaced before anything is computed from them, so log-probs of padding
may be NaN or infinite without poisoning value or gradient.

Legend: B rows of this micro-batch, T completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.algos.kl import estimate_kl
from rlalign.algos.mismatch import Correction, correction, mismatch_metrics
from rlalign.algos.ratio import policy_ratio
from rlalign.algos.surrogate import Clipped, surrogate
from rlalign.types import TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


Figures = dict[str, Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss`: scalar with a graph; the sum over all micro-batches is the loss of the batch.
    `metrics`: detached, additive (see algos/metrics.py).

    >>> # metrics={"clip_ratio/high": (tensor(3.), tensor(512.)), "sampling/logp_diff/max": ...}
    """

    loss: Tensor
    metrics: Figures


@dataclass(frozen=True, slots=True)
class Terms:
    """The batch with everything outside the mask replaced by 0, at least float32."""

    inside_BT: Tensor  # bool
    sampled_BT: Tensor  # bool: those inside that an engine sampled, whose rollout_BT is known
    logp_BT: Tensor
    old_BT: Tensor  # detached: denominator of the policy ratio
    trainer_BT: Tensor  # detached: the trainer's side of the engine/trainer gap
    rollout_BT: Tensor
    ref_BT: Tensor | None
    advantage_BT: Tensor
    weight_BT: Tensor
    policy_weight_BT: Tensor


def policy_loss(
    logp_BT: Tensor, batch: TrainBatch, cfg: AlgoConfig, *, entropy_BT: Tensor | None = None
) -> LossOutput:
    """Loss and metrics of one micro-batch.

    logp_BT: log-probs under the current policy at the sampling temperature, with graph. batch: its
    rows, with `advantage_BT` and `weight_BT` set; `logp_old_BT=None` means one optimizer step per
    rollout, where the old policy is the current one. cfg: resolved. entropy_BT: per-token entropy,
    nats; required when `entropy_coef > 0`. With no token inside the mask the loss is 0 and still
    has a graph. Raises AlgoError when something required is missing or shaped otherwise.
    """
    terms = _terms(logp_BT, batch, cfg)
    level = cfg.importance_sampling_level or ""
    ratio = policy_ratio(terms.logp_BT, terms.old_BT, terms.inside_BT, level)
    loss_BT, clipped = surrogate(ratio, terms.advantage_BT, terms.logp_BT, cfg)
    found = correction(terms.trainer_BT, terms.rollout_BT, terms.sampled_BT, cfg)
    if corrects(cfg):
        loss_BT = loss_BT * _correction_weight(found, batch, cfg)
    loss = (terms.policy_weight_BT * loss_BT).sum()
    if cfg.beta and cfg.kl_in == "loss":
        loss = loss + cfg.beta * (terms.weight_BT * _kl_in_loss(terms, cfg)).sum()
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * (terms.weight_BT * _entropy(entropy_BT, terms)).sum()
    metrics = _metrics(terms, clipped, entropy_BT)
    metrics |= mismatch_metrics(found, terms.trainer_BT, terms.rollout_BT, terms.sampled_BT)
    return LossOutput(loss, metrics)


def corrects(cfg: AlgoConfig) -> bool:
    """Whether importance weights between engine and trainer are multiplied into the loss."""
    return cfg.mismatch.rollout_is not in (None, "none") and not cfg.mismatch.bypass_mode


def _terms(logp_BT: Tensor, batch: TrainBatch, cfg: AlgoConfig) -> Terms:
    inside_BT = batch.mask_BT.bool()

    def masked(tensor: Tensor | None, name: str) -> Tensor:
        if tensor is None:
            raise AlgoError(f"the batch has no {name}; compute it before the loss")
        if tensor.shape != inside_BT.shape:
            raise AlgoError(
                f"{name} has shape {tuple(tensor.shape)}, the mask {tuple(inside_BT.shape)}; "
                "both are [rows, completion tokens]"
            )
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return torch.where(inside_BT, tensor, torch.zeros_like(tensor))

    logp_BT = masked(logp_BT, "logp_BT")
    rollout_BT = masked(batch.logp_rollout_BT, "logp_rollout_BT").detach()
    old_BT = logp_BT.detach()
    if batch.logp_old_BT is not None:
        old_BT = masked(batch.logp_old_BT, "logp_old_BT").detach()
    ref_BT = batch.logp_ref_BT
    if ref_BT is not None or (cfg.beta and cfg.kl_in == "loss"):
        ref_BT = masked(ref_BT, "logp_ref_BT").detach()
    weight_BT = masked(batch.weight_BT, "weight_BT").detach()
    sampled_BT = inside_BT
    if batch.source_id_B is not None:
        sampled_BT = inside_BT & (batch.source_id_B == 0)[:, None]
    return Terms(
        inside_BT,
        sampled_BT,
        logp_BT,
        rollout_BT if cfg.mismatch.bypass_mode else old_BT,
        logp_BT.detach() if cfg.mismatch.bypass_mode else old_BT,
        rollout_BT,
        ref_BT,
        masked(batch.advantage_BT, "advantage_BT").detach(),
        weight_BT,
        weight_BT
        if batch.policy_weight_BT is None
        else masked(batch.policy_weight_BT, "policy_weight_BT").detach(),
    )


def _correction_weight(found: Correction, batch: TrainBatch, cfg: AlgoConfig) -> Tensor:
    if batch.rollout_is_weight_BT is not None:
        return torch.where(batch.mask_BT.bool(), batch.rollout_is_weight_BT.detach(), 0.0)
    if cfg.mismatch.rollout_is_batch_normalize:
        raise AlgoError(
            "algo.mismatch.rollout_is_batch_normalize needs the mean over the whole batch: set "
            "TrainBatch.rollout_is_weight_BT with rlalign.algos.rollout_weights"
        )
    return found.weight


def _kl_in_loss(terms: Terms, cfg: AlgoConfig) -> Tensor:
    assert terms.ref_BT is not None
    kl_BT = estimate_kl(terms.logp_BT, terms.ref_BT, cfg.kl_estimator or "")
    if cfg.use_bias_correction_kl:
        # The KL is a sum over tokens, so its importance ratio is the token's own at every level.
        kl_BT = policy_ratio(terms.logp_BT, terms.old_BT, terms.inside_BT, "token") * kl_BT
    return kl_BT


def _entropy(entropy_BT: Tensor | None, terms: Terms) -> Tensor:
    if entropy_BT is None:
        raise AlgoError("algo.entropy_coef > 0 needs entropy_BT; pass it to policy_loss")
    return torch.where(terms.inside_BT, entropy_BT, torch.zeros_like(entropy_BT))


def _metrics(terms: Terms, clipped: Clipped, entropy_BT: Tensor | None) -> Figures:
    inside_BT, logp_BT = terms.inside_BT, terms.logp_BT.detach()
    count = inside_BT.sum().to(logp_BT.dtype)
    metrics: Figures = {
        f"clip_ratio/{name}": ((where_BT & inside_BT).sum().to(logp_BT.dtype), count)
        for name, where_BT in clipped.items()
    }
    metrics["approx_kl_old"] = ((terms.old_BT - logp_BT).sum(), count)
    if terms.ref_BT is not None:
        # Always k3 in the log: non-negative, low variance, and its mean is the KL, whichever
        # estimator trains.
        metrics["kl"] = (estimate_kl(logp_BT, terms.ref_BT, "k3").sum(), count)
    if entropy_BT is not None:
        metrics["entropy"] = (_entropy(entropy_BT.detach(), terms).sum(), count)
    return metrics
