"""Properties of each algorithm with a loss of its own for the estimates of a diffusion language
model, and of wd1's credit.

Legend: B completions, J passes, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from rlalign import algos
from rlalign.config import AlgoConfig
from rlalign.types import Masks, TrainBatch
from rlalign.verify import elbo_reference as reference
from rlalign.verify.cases import MAX_LENGTH, config, difference, worst
from rlalign.verify.table import per_algorithm

PASSES = 4
GROUP_ID = [7, 3, 7, 3, 7, 11, 3, 7]
REWARD = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0, math.nan, 1.0]
LENGTH = [6, 4, 1, 6, 3, 5, 2, 0]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Eight completions with masks, advantages and weights; float64."""

    logp_BJT: Tensor
    batch: TrainBatch


def make_case(cfg: AlgoConfig, seed: int = 0, gap: float = 0.3) -> Case:
    """Ragged, interleaved, with an unscorable reward, an empty completion and a group of one; the
    three policies' log-probs are `gap` apart."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = (torch.arange(MAX_LENGTH) < torch.tensor(LENGTH)[:, None]).double()
    reward_B = torch.tensor(REWARD, dtype=torch.float64)
    mask_BT = mask_BT * reward_B.isfinite()[:, None]
    masks = _masks(mask_BT.bool(), cfg, seed)

    def logp() -> Tensor:
        return gap * torch.randn(masks.weight_BJT.shape, generator=generator, dtype=torch.float64)

    old_BJT = -0.2 - logp().abs() / max(gap, 0.1)
    batch = TrainBatch(
        sequences=tuple((0,) * (n + 2) for n in LENGTH),
        completion_len_B=torch.tensor(LENGTH),
        group_id_B=torch.tensor(GROUP_ID),
        mask_BT=mask_BT,
        reward_B=reward_B,
        logp_rollout_BT=torch.zeros_like(mask_BT),
        masks=masks,
        logp_old_BJT=old_BJT,
        logp_ref_BT=algos.combine(old_BJT + logp(), masks),
    )
    return Case(old_BJT + logp(), _credited(batch, cfg))


def _masks(valid_BT: Tensor, cfg: AlgoConfig, seed: int) -> Masks:
    likelihood = dataclasses.replace(cfg.likelihood, num_mc_samples=PASSES)
    seeds = [100 * seed + i for i in range(len(valid_BT))]
    block_BT = (torch.arange(MAX_LENGTH) // 3).expand(valid_BT.shape)
    drawn = algos.draw_masks(valid_BT, [2] * len(seeds), seeds, likelihood, block_BT=block_BT)
    weight_BJT = drawn.weight_BJT.double()
    if likelihood.estimator == "block_noise":  # means, which float32 rounds
        scored_BJT = weight_BJT != 0
        weight_BJT = scored_BJT.double() / (PASSES * scored_BJT.sum(2, keepdim=True)).clamp(min=1)
    return Masks(drawn.hidden_BJT, weight_BJT.double())


def _credited(batch: TrainBatch, cfg: AlgoConfig) -> TrainBatch:
    advantage_BT = algos.compute_advantages(
        batch.reward_B, batch.reward_B.nan_to_num(), batch.group_id_B, batch.mask_BT, cfg
    )
    credited = batch.replace(advantage_BT=advantage_BT)
    return algos.attach_weights(credited, cfg, max_completion_length=MAX_LENGTH)


def value_and_slopes(logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig) -> tuple[Tensor, Tensor]:
    """The shipped loss of every pass and its derivative in each log-prob."""
    leaf_BJT = logp_BJT.detach().clone().requires_grad_(True)
    loss = algos.estimate_loss(leaf_BJT, batch, cfg, MAX_LENGTH).loss
    (slope_BJT,) = torch.autograd.grad(loss, leaf_BJT)
    return loss.detach(), slope_BJT


def completions(logp_BJT: Tensor, batch: TrainBatch) -> list[reference.Completion]:
    """The rows that train as the reference wants them. The combined estimates of the reference
    model are put where one pass has them, with its weight."""
    assert batch.masks and batch.advantage_BT is not None and batch.weight_BT is not None
    assert batch.logp_old_BJT is not None and batch.logp_ref_BT is not None
    weight_BJT, found = batch.masks.weight_BJT, []
    for b in range(len(batch)):
        length = int(batch.mask_BT[b].sum())
        if not length:
            continue
        passes: list[dict[int, reference.Cell]] = []
        told: set[int] = set()
        for j in range(weight_BJT.shape[1]):
            cells: dict[int, reference.Cell] = {}
            for t in weight_BJT[b, j].nonzero()[:, 0].tolist():
                weight = float(weight_BJT[b, j, t])
                whole = 0.0 if t in told else float(batch.logp_ref_BT[b, t]) / weight
                told.add(t)
                now, old = float(logp_BJT[b, j, t]), float(batch.logp_old_BJT[b, j, t])
                cells[t] = (weight, now, old, whole)
            passes.append(cells)
        found.append(
            reference.Completion(
                passes,
                float(batch.advantage_BT[b, 0]),
                float(batch.weight_BT[b].sum()),
                length,
                int(batch.group_id_B[b]),
                float(batch.reward_B[b]),
            )
        )
    return found


def by_loops(name: str, logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig) -> float:
    rows, beta = completions(logp_BJT, batch), cfg.beta or 0.0
    clip = (cfg.epsilon or 0.0, cfg.epsilon_high or 0.0)
    name = algos.get(name).name
    if name == "bgpo":
        return reference.bgpo(rows, clip, MAX_LENGTH)
    if name == "espo":
        return reference.espo(rows, clip, MAX_LENGTH, beta)
    if name == "spg":
        return reference.spg(rows, cfg.likelihood.eubo_power, cfg.likelihood.eubo_share)
    return reference.vrpo(rows, beta)


def has_reference(name: str) -> bool:
    return algos.get(name).name in ("bgpo", "espo", "spg", "vrpo")


@per_algorithm(
    "loss of all passes = the formula in float64 loops",
    source="the preset's own source",
    bound=1e-9,
    applies=has_reference,
    kind="estimates",
)
def value(name: str) -> float:
    cfg, errors = config(name), []
    for seed, gap in ((0, 0.3), (1, 0.05), (2, 1.0)):
        case = make_case(cfg, seed, gap)
        loss, _ = value_and_slopes(case.logp_BJT, case.batch, cfg)
        errors.append(difference(loss, by_loops(name, case.logp_BJT, case.batch, cfg)))
    return worst(errors)


@per_algorithm(
    "slopes = differences of the formula in loops",
    source="central differences, step 1e-5",
    bound=1e-8,
    applies=has_reference,
    kind="estimates",
)
def slopes(name: str) -> float:
    cfg = config(name)
    case = make_case(cfg)
    _, slope_BJT = value_and_slopes(case.logp_BJT, case.batch, cfg)
    assert case.batch.masks is not None
    errors, step = [], 1e-5
    for at in (case.batch.masks.weight_BJT != 0).nonzero().tolist():
        sides = []
        for sign in (1, -1):
            moved_BJT = case.logp_BJT.clone()
            moved_BJT[tuple(at)] += sign * step
            sides.append(by_loops(name, moved_BJT, case.batch, cfg))
        errors.append(abs((sides[0] - sides[1]) / (2 * step) - float(slope_BJT[tuple(at)])))
    return worst(errors)


@per_algorithm(
    "permuting completions, relabelling groups: nothing changes",
    source="a sum over a set",
    bound=1e-12,
    kind="estimates",
)
def permutation(name: str) -> float:
    cfg = config(name)
    case = make_case(cfg)
    loss, slope_BJT = value_and_slopes(case.logp_BJT, case.batch, cfg)
    order = [5, 0, 3, 7, 1, 4, 2, 6]
    moved = case.batch.rows(order)
    moved = moved.replace(group_id_B=20 - moved.group_id_B)
    other, other_BJT = value_and_slopes(case.logp_BJT[order], moved, cfg)
    return worst([difference(other, loss), difference(other_BJT, slope_BJT[order])])


@per_algorithm(
    "NaN and inf where nothing is scored reach neither loss nor slopes",
    source="mask first, then sum",
    bound=0.0,
    kind="estimates",
)
def unscored(name: str) -> float:
    cfg = config(name)
    case = make_case(cfg)
    assert case.batch.masks is not None and case.batch.logp_old_BJT is not None
    loss, slope_BJT = value_and_slopes(case.logp_BJT, case.batch, cfg)
    outside_BJT = case.batch.masks.weight_BJT == 0
    errors = []
    for bad in (math.nan, math.inf, -math.inf):
        old_BJT = case.batch.logp_old_BJT.masked_fill(outside_BJT, bad)
        spoilt = case.batch.replace(logp_old_BJT=old_BJT)
        now_BJT = case.logp_BJT.masked_fill(outside_BJT, bad)
        bad_loss, bad_BJT = value_and_slopes(now_BJT, spoilt, cfg)
        errors += [difference(bad_loss, loss), difference(bad_BJT, slope_BJT)]
    return worst(errors)


@per_algorithm(
    "equal rewards, and rows without a reward: no slope",
    source="definition",
    bound=0.0,
    kind="estimates",
)
def silent(name: str) -> float:
    cfg = config(name)
    if not algos.couples_rows(cfg):  # without beta it prefers nothing
        cfg = dataclasses.replace(cfg, beta=0.0)
    case = make_case(cfg)
    errors = []
    for rewards in ([0.3] * len(REWARD), [math.nan] * len(REWARD)):
        reward_B = torch.tensor(rewards, dtype=torch.float64)
        equal = _credited(case.batch.replace(reward_B=reward_B), cfg)
        loss, slope_BJT = value_and_slopes(case.logp_BJT, equal, cfg)
        errors += [difference(slope_BJT, 0.0), 0.0 if bool(loss.isfinite()) else math.nan]
    return worst(errors)


@per_algorithm(
    "float32 slopes = float64 slopes, relative", source="rounding", bound=1e-5, kind="estimates"
)
def precision(name: str) -> float:
    cfg = config(name)
    case = make_case(cfg)
    _, exact_BJT = value_and_slopes(case.logp_BJT, case.batch, cfg)
    values = {f.name: getattr(case.batch, f.name) for f in dataclasses.fields(case.batch)}
    rounded: dict[str, Any] = {
        key: value.float()
        for key, value in values.items()
        if torch.is_tensor(value) and value.is_floating_point()
    }
    assert case.batch.masks is not None
    rounded["masks"] = Masks(case.batch.masks.hidden_BJT, case.batch.masks.weight_BJT.float())
    batch = case.batch.replace(**rounded)
    _, found_BJT = value_and_slopes(case.logp_BJT.float(), batch, cfg)
    return difference(found_BJT, exact_BJT) / float(exact_BJT.abs().max())


@per_algorithm(
    "wd1: advantages = n (softmax(A) - softmax(-A)) in loops",
    source="Tang et al. 2025, arXiv 2507.08838",
    bound=1e-9,
    applies=lambda name: algos.get(name).name == "wd1",
)
def weighted_likelihood(name: str) -> float:
    cfg = config(name)
    reward_B = torch.tensor(REWARD, dtype=torch.float64)
    mask_BT = torch.ones(len(REWARD), 1)
    ours_BT = algos.compute_advantages(
        reward_B, reward_B.nan_to_num(), torch.tensor(GROUP_ID), mask_BT, cfg
    )
    return difference(ours_BT[:, 0], reference.wd1(REWARD, GROUP_ID))
