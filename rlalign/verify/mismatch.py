"""Properties of the engine/trainer correction."""

from __future__ import annotations

import dataclasses

import torch

from rlalign import algos
from rlalign.config import AlgoConfig
from rlalign.verify import reference
from rlalign.verify.cases import (
    config,
    credited,
    difference,
    loss_inputs,
    make_case,
    value_and_gradient,
    worst,
)
from rlalign.verify.table import shared

TIS = "Yao et al. 2025 (truncated importance sampling)"
UNBOUNDED = {"rollout_is_min": 0.0, "rollout_is_max": float("inf")}


def loss_with(mismatch: dict) -> float:
    case = make_case()
    cfg = config(mismatch=mismatch, beta=0.0)
    return float(value_and_gradient(case.logp_BT, credited(case, cfg), cfg)[0])


@shared("mask with [0, inf) = truncate with [0, inf)", source="definition", bound=0.0)
def no_bounds() -> float:
    return worst(
        abs(
            loss_with({"rollout_is": level, "rollout_is_mode": "mask", **UNBOUNDED})
            - loss_with({"rollout_is": level, "rollout_is_mode": "truncate", **UNBOUNDED})
        )
        for level in ("token", "sequence", "seq_mask_tis")
    )


@shared("the weights carry no gradient", source=TIS, bound=1e-12)
def detached() -> float:
    """With logp_old unset the weights depend on the current log-probs; the gradient must be that
    of the loss with the weights as constants."""
    case = make_case()
    errors = []
    for level in ("token", "sequence", "seq_mask_tis"):
        cfg = config(mismatch={"rollout_is": level}, beta=0.0)
        batch = credited(case, cfg).replace(logp_old_BT=None)
        _, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
        inputs = loss_inputs(case.logp_BT, batch.replace(logp_old_BT=case.logp_BT), cfg)
        _, expected_BT = reference.loss_and_gradient(inputs, cfg)
        errors.append(difference(gradient_BT, expected_BT))
    return worst(errors)


@shared("the KL term is not weighted", source="order of operations", bound=1e-12)
def kl_outside() -> float:
    case = make_case()
    cfg = config(mismatch={"rollout_is": "sequence"}, beta=0.3)
    batch = credited(case, cfg)
    assert batch.advantage_BT is not None
    silent = batch.replace(advantage_BT=torch.zeros_like(batch.advantage_BT))
    plain = config(mismatch={"rollout_is": "none"}, beta=0.3)
    return difference(
        value_and_gradient(case.logp_BT, silent, cfg)[1],
        value_and_gradient(case.logp_BT, silent, plain)[1],
    )


@shared("bypass = the engine's log-probs as logp_old", source="definition", bound=0.0)
def bypass() -> float:
    case = make_case()
    cfg, plain = config(mismatch={"bypass_mode": True}), config(mismatch={"rollout_is": "none"})
    batch = credited(case, plain)
    engine = batch.replace(logp_old_BT=batch.logp_rollout_BT)
    return difference(
        value_and_gradient(case.logp_BT, batch, cfg)[1],
        value_and_gradient(case.logp_BT, engine, plain)[1],
    )


def batch_mean(cfg: AlgoConfig) -> float:
    """How far the mean of the normalised weights is from 1."""
    case = make_case()
    normalized = dataclasses.replace(
        cfg, mismatch=dataclasses.replace(cfg.mismatch, rollout_is_batch_normalize=True)
    )
    batch = credited(case, normalized)
    assert batch.logp_old_BT is not None
    weight_BT = algos.rollout_weights(
        batch.logp_old_BT, batch.logp_rollout_BT, batch.mask_BT, normalized
    )
    units = [
        float(w)
        for row, mask in zip(weight_BT, batch.mask_BT, strict=True)
        for w in (row[mask > 0][:1] if cfg.mismatch.rollout_is == "sequence" else row[mask > 0])
    ]
    return abs(sum(units) / len(units) - 1)


@shared("batch-normalised weights have mean 1", source="definition", bound=1e-12)
def normalized_mean() -> float:
    levels = ("token", "sequence", "seq_mask_tis")
    return worst(batch_mean(config(mismatch={"rollout_is": level})) for level in levels)


@shared("ESS = (sum w)^2 / sum w^2 / n", source="Kish 1965", bound=1e-9)
def effective_sample_size() -> float:
    case = make_case()
    cfg = config(mismatch={"rollout_is": "token"})
    batch = credited(case, cfg)
    weights = [
        w
        for row, mask in zip(
            reference.mismatch_weights(loss_inputs(case.logp_BT, batch, cfg), cfg),
            batch.mask_BT.tolist(),
            strict=True,
        )
        for w, m in zip(row, mask, strict=True)
        if m
    ]
    expected = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    metrics = algos.finalize_metrics(algos.policy_loss(case.logp_BT, batch, cfg).metrics)
    ratio = "sampling/importance_sampling_ratio"
    return worst(
        [
            abs(metrics["sampling/ess"] - expected),
            abs(metrics[f"{ratio}/mean"] - sum(weights) / len(weights)),
            abs(metrics[f"{ratio}/max"] - max(weights)),
            abs(metrics[f"{ratio}/min"] - min(weights)),
        ]
    )
