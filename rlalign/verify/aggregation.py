"""Properties of the weights that turn token losses into one number."""

from __future__ import annotations

import itertools

import torch

from rlalign import algos
from rlalign.verify import reference
from rlalign.verify.cases import MAX_LENGTH, config, difference, make_case, worst
from rlalign.verify.table import shared

MODES = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-mean-local",
)


@shared("every mode and prompt weighting = float64 loops", source="definitions", bound=1e-12)
def grid() -> float:
    errors = []
    for mode, prompts, factor in itertools.product(MODES, ("sample", "prompt"), (None, 17.0)):
        if factor and mode != "seq-mean-token-sum-norm":
            continue
        cfg = config(loss_agg_mode=mode, prompt_weighting=prompts, loss_scale_factor=factor)
        batch = make_case().batch
        ours_BT = algos.aggregation_weights(
            batch.mask_BT, batch.group_id_B, cfg, max_completion_length=MAX_LENGTH
        )
        theirs = reference.weights(
            batch.mask_BT.tolist(), batch.group_id_B.tolist(), cfg, MAX_LENGTH
        )
        errors.append(difference(ours_BT, theirs))
    return worst(errors)


@shared(
    "equal lengths: token-mean = seq-mean-token-mean = sum-norm with factor = length",
    source="algebra",
    bound=1e-15,
)
def equal_lengths() -> float:
    batch = make_case(equal_lengths=True).batch
    token_mean_BT, *others = (
        algos.aggregation_weights(
            batch.mask_BT,
            batch.group_id_B,
            config(loss_agg_mode=mode),
            max_completion_length=MAX_LENGTH,
        )
        for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    )
    return worst(difference(other_BT, token_mean_BT) for other_BT in others)


@shared(
    "equal lengths and group sizes: weighting by prompt = by sample", source="algebra", bound=1e-15
)
def equal_groups() -> float:
    mask_BT = torch.ones(6, 4, dtype=torch.float64)
    group_id_B = torch.tensor([5, 2, 9, 2, 9, 5])
    errors = []
    for mode in MODES:
        by_sample_BT, by_prompt_BT = (
            algos.aggregation_weights(
                mask_BT,
                group_id_B,
                config(loss_agg_mode=mode, prompt_weighting=weighting),
                max_completion_length=9,
            )
            for weighting in ("sample", "prompt")
        )
        errors.append(difference(by_prompt_BT, by_sample_BT))
    return worst(errors)


@shared(
    "weighting by prompt: every prompt with tokens has the same total",
    source="definition",
    bound=1e-12,
)
def prompt_totals() -> float:
    batch = make_case().batch
    errors = []
    for mode in ("token-mean", "seq-mean-token-mean"):
        weight_BT = algos.aggregation_weights(
            batch.mask_BT,
            batch.group_id_B,
            config(loss_agg_mode=mode, prompt_weighting="prompt"),
            max_completion_length=MAX_LENGTH,
        )
        totals = [
            float(weight_BT[batch.group_id_B == label].sum()) for label in batch.group_id_B.unique()
        ]
        errors += [abs(total - 1 / len(totals)) for total in totals]
    return worst(errors)


@shared("a fully masked row counts nowhere", source="verl, OpenRLHF", bound=1e-15)
def masked_rows() -> float:
    batch = make_case().batch
    kept = [i for i in range(len(batch)) if float(batch.mask_BT[i].sum()) > 0]
    errors = []
    for mode, prompts in itertools.product(MODES, ("sample", "prompt")):
        cfg = config(loss_agg_mode=mode, prompt_weighting=prompts)
        with_it, without = (
            algos.aggregation_weights(
                batch.mask_BT[rows], batch.group_id_B[rows], cfg, max_completion_length=MAX_LENGTH
            )
            for rows in (list(range(len(batch))), kept)
        )
        errors.append(difference(with_it[kept], without))
    return worst(errors)
