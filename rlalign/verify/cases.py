"""Batches to check on: small, ragged, interleaved, with everything that tends to go wrong.

Legend: B rows, T completion tokens.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign import algos
from rlalign.algos import AlgoWarning
from rlalign.config import AlgoConfig
from rlalign.types import TrainBatch
from rlalign.verify.reference import LossInputs

MAX_LENGTH = 6


@dataclass(frozen=True, slots=True)
class Case:
    """One optimizer batch in float64; `batch` has no advantages or weights yet."""

    logp_BT: Tensor
    batch: TrainBatch
    acc_B: Tensor
    kl_BT: Tensor


def make_case(seed: int = 0, *, gap: float = 0.4, equal_lengths: bool = False) -> Case:
    """Eleven samples in groups of 1, 2, 3 and 5, interleaved, with one unscorable reward; masks
    with holes and a fully masked row unless `equal_lengths`. `gap` is the standard deviation of
    the differences between current, old, reference and engine log-probs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    group_id_B = torch.tensor([7, 3, 90, 3, 7, 90, 7, 11, 7, 90, 7])
    reward_B = torch.tensor([1, 0, 1, 1, 0, 1, 0.5, 1, float("nan"), 0, 0], dtype=torch.float64)
    length_B = torch.tensor([4, 6, 1, 3, 5, 6, 2, 4, 3, 5, 3])
    shape = (len(group_id_B), MAX_LENGTH)
    if equal_lengths:
        length_B = torch.full_like(length_B, MAX_LENGTH)
    mask_BT = (torch.arange(MAX_LENGTH) < length_B[:, None]).double()
    if not equal_lengths:
        mask_BT[4, 1:3] = 0  # tool output in the middle of a completion
        mask_BT[6] = 0  # truncated, so it lost its gradient
    old_BT = -0.3 - normal(*shape).abs()
    batch = TrainBatch(
        sequences=tuple((0,) * int(n) for n in length_B),
        completion_len_B=length_B,
        group_id_B=group_id_B,
        mask_BT=mask_BT,
        reward_B=reward_B,
        logp_rollout_BT=old_BT + gap * normal(*shape),
        logp_old_BT=old_BT,
        logp_ref_BT=old_BT + gap * normal(*shape),
    )
    acc_B = reward_B.nan_to_num().round()
    return Case(old_BT + gap * normal(*shape), batch, acc_B, 0.1 * normal(*shape))


def config(
    loss_type: str = "grpo",
    *,
    mismatch: dict | None = None,
    tree: dict | None = None,
    overlong: dict | None = None,
    **fields,
) -> AlgoConfig:
    """A resolved config of the preset with `fields` overridden; its warnings are not for here."""
    cfg = AlgoConfig(loss_type=loss_type, **fields)
    sections = {"mismatch": mismatch, "tree": tree, "overlong": overlong}
    for section, changes in sections.items():
        changed = dataclasses.replace(getattr(cfg, section), **(changes or {}))
        cfg = dataclasses.replace(cfg, **{section: changed})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlgoWarning)
        return algos.resolve(cfg, engine_shares_parameters=False)


def credited(case: Case, cfg: AlgoConfig) -> TrainBatch:
    """The case's batch with advantages and weights by the shipped code."""
    batch = case.batch
    advantage_BT = algos.compute_advantages(
        batch.reward_B, case.acc_B, batch.group_id_B, batch.mask_BT, cfg, kl_BT=case.kl_BT
    )
    return weighted(batch.replace(advantage_BT=advantage_BT), cfg)


def weighted(batch: TrainBatch, cfg: AlgoConfig, share: float = 1.0) -> TrainBatch:
    """The batch with weights by the shipped code, scaled by `share`."""
    return algos.attach_weights(batch, cfg, max_completion_length=MAX_LENGTH, share=share)


def value_and_gradient(
    logp_BT: Tensor, batch: TrainBatch, cfg: AlgoConfig
) -> tuple[Tensor, Tensor]:
    """The shipped loss and its autograd gradient in logp."""
    leaf_BT = logp_BT.detach().clone().requires_grad_(True)
    loss = algos.policy_loss(leaf_BT, batch, cfg, entropy_BT=-leaf_BT).loss
    (gradient_BT,) = torch.autograd.grad(loss, leaf_BT)
    return loss.detach(), gradient_BT


def split_gradient(
    logp_BT: Tensor, batch: TrainBatch, cfg: AlgoConfig, ranks: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """The gradient as a data-parallel trainer forms it: `ranks[w][k]` are the rows of micro-batch
    k on process w. The backend averages over the W processes and divides by the K accumulation
    steps, so each micro-batch's loss is multiplied by W * K beforehand."""
    world = len(ranks)
    total_BT = torch.zeros_like(logp_BT)
    for micro_batches in ranks:
        for rows in micro_batches:
            micro = batch.rows(rows)
            width, steps = micro.mask_BT.shape[1], len(micro_batches)
            if algos.depends_on_split(cfg):
                micro = weighted(micro, cfg, share=1 / (world * steps))
            _, part_BT = value_and_gradient(logp_BT[list(rows)][:, :width], micro, cfg)
            total_BT[list(rows), :width] += part_BT * (world * steps) / steps / world
    return total_BT


def loss_inputs(logp_BT: Tensor, batch: TrainBatch, cfg: AlgoConfig) -> LossInputs:
    """The same batch as plain lists, for the reference."""
    bypass = cfg.mismatch.bypass_mode
    assert batch.advantage_BT is not None and batch.weight_BT is not None
    old_BT = batch.logp_rollout_BT if bypass else batch.logp_old_BT
    assert old_BT is not None and batch.logp_ref_BT is not None
    policy_BT = batch.policy_weight_BT
    return LossInputs(
        logp_BT.tolist(),
        old_BT.tolist(),
        batch.logp_rollout_BT.tolist(),
        batch.logp_ref_BT.tolist(),
        batch.mask_BT.tolist(),
        batch.advantage_BT.tolist(),
        batch.weight_BT.tolist(),
        (batch.weight_BT if policy_BT is None else policy_BT).tolist(),
    )


def difference(one: Tensor, other: Tensor | Sequence | float) -> float:
    """Largest absolute difference; NaN where either is NaN."""
    reference = torch.as_tensor(other, dtype=torch.float64)
    return float((one.double() - reference).abs().max())


def worst(errors: Iterable[float]) -> float:
    """The largest of several errors; NaN if any is, or if there is none."""
    values = torch.tensor(list(errors), dtype=torch.float64)
    return float(values.max()) if len(values) else float("nan")
