"""Properties of each algorithm: agreement with the reference, and what all of them must obey."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from rlalign import algos
from rlalign.algos import Algorithm
from rlalign.verify import reference
from rlalign.verify.cases import (
    MAX_LENGTH,
    Case,
    config,
    credited,
    difference,
    loss_inputs,
    make_case,
    split_gradient,
    value_and_gradient,
    worst,
)
from rlalign.verify.table import per_algorithm

CASES = ((0, 0.4), (1, 0.4), (2, 3e-4), (3, 0.0))  # seed and distance from the old policy


def shared_credit(name: str) -> bool:
    return algos.get(name).credit is Algorithm.credit


def shared_loss(name: str) -> bool:
    return algos.get(name).loss is Algorithm.loss


def row_by_row(name: str) -> bool:
    """Whether rows may be taken apart; else verify/contrastive.py takes whole groups."""
    return not algos.get(name).couples_rows


def has_baseline(name: str) -> bool:
    return shared_credit(name) and config(name).adv_estimator != "raft" and row_by_row(name)


def averages_over_accepted(name: str) -> bool:
    cfg = config(name)
    return cfg.adv_estimator == "raft" and cfg.allocation.normalize_over == "accepted"


@per_algorithm(
    "advantages = the formula in float64 loops",
    source="the preset's own source",
    bound=1e-9,
    applies=shared_credit,
)
def advantages(name: str) -> float:
    cfg = config(name)

    def error(case: Case) -> float:
        batch = case.batch
        ours_BT = credited(case, cfg).advantage_BT
        assert ours_BT is not None
        theirs = reference.advantages(
            batch.reward_B.tolist(),
            case.acc_B.tolist(),
            batch.group_id_B.tolist(),
            batch.mask_BT.tolist(),
            case.kl_BT.tolist(),
            cfg,
        )
        return difference(ours_BT, theirs)

    return worst(error(make_case(seed)) for seed, _ in CASES)


@per_algorithm(
    "loss = the formula in float64 loops",
    source="the preset's own source",
    bound=1e-9,
    applies=shared_loss,
)
def value(name: str) -> float:
    return worst(_against_reference(name, *case)[0] for case in CASES)


@per_algorithm(
    "gradient = the closed form",
    source="the derivative of the formula, by hand",
    bound=1e-9,
    applies=shared_loss,
)
def gradient(name: str) -> float:
    return worst(_against_reference(name, *case)[1] for case in CASES)


@per_algorithm(
    "float32 gradient = float64 gradient, relative",
    source="rounding",
    bound=1e-5,
)
def precision(name: str) -> float:
    cfg, case = config(name), make_case()
    batch = credited(case, cfg)
    _, exact_BT = value_and_gradient(case.logp_BT, batch, cfg)
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    rounded = {
        key: value.float()
        for key, value in values.items()
        if torch.is_tensor(value) and value.is_floating_point()
    }
    _, rounded_BT = value_and_gradient(case.logp_BT.float(), batch.replace(**rounded), cfg)
    return difference(rounded_BT, exact_BT) / float(exact_BT.abs().max())


@per_algorithm(
    "permuting rows, relabelling groups: nothing changes",
    source="a sum over a set",
    bound=1e-12,
)
def permutation(name: str) -> float:
    cfg, case = config(name), make_case()
    batch = credited(case, cfg)
    loss, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
    order = torch.tensor([8, 2, 10, 0, 5, 3, 9, 7, 1, 6, 4])
    moved = case.batch.rows(order.tolist())
    relabelled = moved.replace(group_id_B=moved.group_id_B.max() * 2 - moved.group_id_B)
    other = credited(
        Case(case.logp_BT[order], relabelled, case.acc_B[order], case.kl_BT[order]), cfg
    )
    assert batch.advantage_BT is not None and other.advantage_BT is not None
    moved_loss, moved_BT = value_and_gradient(case.logp_BT[order], other, cfg)
    return worst(
        [
            difference(moved_loss, loss),
            difference(moved_BT, gradient_BT[order]),
            difference(other.advantage_BT, batch.advantage_BT[order]),
        ]
    )


def splits_freely(name: str) -> bool:
    return not algos.depends_on_split(config(name)) and row_by_row(name)


PARTITIONS = (
    [[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]],
    [[[0, 1, 2], [3, 4], [5, 6, 7, 8, 9, 10]]],
    [[[i] for i in range(10, -1, -1)]],
    [[[0, 5, 6], [1]], [[2, 4], [3, 7, 8, 9, 10]]],
    [[[10, 2]], [[0, 4, 6]], [[1, 3, 5, 7, 8, 9]]],
)


@per_algorithm(
    "any split into micro-batches and processes: one gradient",
    source="linearity in weights fixed on the global batch",
    bound=1e-12,
    applies=splits_freely,
)
def split(name: str) -> float:
    cfg, case = config(name), make_case()
    batch = credited(case, cfg)
    _, whole_BT = value_and_gradient(case.logp_BT, batch, cfg)
    return worst(
        difference(split_gradient(case.logp_BT, batch, cfg, partition), whole_BT)
        for partition in PARTITIONS
    )


@per_algorithm(
    "a per-micro-batch mean does depend on the split",
    source="TRL's bnpo; error 1 if it does not",
    bound=0.0,
    applies=lambda name: algos.depends_on_split(config(name)),
)
def local_split(name: str) -> float:
    cfg, case = config(name), make_case()
    batch = credited(case, cfg)
    one_BT, *others = (split_gradient(case.logp_BT, batch, cfg, p) for p in PARTITIONS)
    return float(all(difference(other_BT, one_BT) < 1e-3 for other_BT in others))


@per_algorithm("equal rewards give exactly 0", source="definition", bound=0.0, applies=has_baseline)
def equal_rewards(name: str) -> float:
    cfg, case = config(name, beta=0.0), make_case()
    errors = []
    rewards = (0.98, 0.1, 0.7, 1.0, 0.0, -3.0, 1e9)
    for reward, dtype in itertools.product(rewards, (torch.float32, torch.float64)):
        reward_B = torch.full((11,), reward, dtype=dtype)
        equal = case.batch.replace(reward_B=reward_B)
        acc_B = torch.ones(11)
        advantage_BT = credited(Case(case.logp_BT, equal, acc_B, case.kl_BT), cfg).advantage_BT
        assert advantage_BT is not None
        errors.append(difference(advantage_BT, 0.0))
    return worst(errors)


@per_algorithm(
    "NaN and inf rewards: advantage 0, others as if the row were not there",
    source="definition",
    bound=1e-12,
)
def unscorable(name: str) -> float:
    cfg, case = config(name), make_case()
    errors = []
    for bad in (float("nan"), float("inf"), float("-inf")):
        reward_B = case.batch.reward_B.clone()
        reward_B[8] = bad
        batch = case.batch.replace(reward_B=reward_B)
        with_it = credited(Case(case.logp_BT, batch, case.acc_B, case.kl_BT), cfg).advantage_BT
        rest = [i for i in range(11) if i != 8]
        smaller = Case(case.logp_BT[rest], batch.rows(rest), case.acc_B[rest], case.kl_BT[rest])
        without = credited(smaller, cfg).advantage_BT
        assert with_it is not None and without is not None
        errors += [difference(with_it[8], 0.0), difference(with_it[rest], without)]
    return worst(errors)


@per_algorithm(
    "NaN and inf outside the mask reach neither loss nor gradient",
    source="mask first, then exponentiate",
    bound=0.0,
)
def padding(name: str) -> float:
    cfg, case = config(name), make_case()
    batch = credited(case, cfg)
    loss, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
    errors = []
    for bad in (float("nan"), float("inf"), float("-inf"), 1e30):
        outside_BT = batch.mask_BT == 0

        def spoil(tensor: torch.Tensor, outside_BT=outside_BT, bad=bad) -> torch.Tensor:
            return torch.where(outside_BT, bad, tensor)

        assert batch.logp_old_BT is not None and batch.logp_ref_BT is not None
        spoilt = batch.replace(
            logp_old_BT=spoil(batch.logp_old_BT),
            logp_ref_BT=spoil(batch.logp_ref_BT),
            logp_rollout_BT=spoil(batch.logp_rollout_BT),
        )
        bad_loss, bad_BT = value_and_gradient(spoil(case.logp_BT), spoilt, cfg)
        errors += [difference(bad_loss, loss), difference(bad_BT, gradient_BT)]
    return worst(errors)


@per_algorithm(
    "no token left: loss 0 with a graph, gradient 0", source="0/0 := 0 with a graph", bound=0.0
)
def all_masked(name: str) -> float:
    cfg, case = config(name), make_case()
    empty = case.batch.replace(mask_BT=torch.zeros_like(case.batch.mask_BT))
    batch = credited(Case(case.logp_BT, empty, case.acc_B, case.kl_BT), cfg)
    loss, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
    return worst([difference(loss, 0.0), difference(gradient_BT, 0.0)])


@per_algorithm(
    "a perfect engine: correction changes nothing, ESS is 1",
    source="exp(0) = 1",
    bound=0.0,
    applies=shared_loss,
)
def perfect_engine(name: str) -> float:
    case = make_case()
    plain = config(name, mismatch={"rollout_is": "none"})
    batch = credited(case, plain).replace(logp_rollout_BT=case.batch.logp_old_BT)
    loss, gradient_BT = value_and_gradient(case.logp_BT, batch, plain)
    errors = []
    for level in ("token", "sequence", "sequence_geomean", "seq_mask_tis"):
        cfg = config(name, mismatch={"rollout_is": level, "rollout_is_mode": "mask"})
        output = algos.policy_loss(case.logp_BT, batch, cfg)
        corrected, corrected_BT = value_and_gradient(case.logp_BT, batch, cfg)
        ess = algos.finalize_metrics(output.metrics)["sampling/ess"]
        errors += [difference(corrected, loss), difference(corrected_BT, gradient_BT)]
        errors.append(abs(ess - 1))
    return worst(errors)


@per_algorithm(
    "metrics of the parts add up to those of the whole",
    source="sums and weights",
    bound=1e-9,
    applies=row_by_row,
)
def metrics(name: str) -> float:
    cfg, case = config(name), make_case()
    batch = credited(case, cfg)

    def of(rows: list[int]):
        micro = batch.rows(rows)
        logp_BT = case.logp_BT[rows][:, : micro.mask_BT.shape[1]]
        return algos.policy_loss(logp_BT, micro, cfg, entropy_BT=-logp_BT).metrics

    whole = algos.finalize_metrics(of(list(range(11))))
    parts = algos.finalize_metrics(
        algos.merge_metrics([of([4, 0]), of([6]), of([1, 2, 3, 5, 7, 8, 9, 10])])
    )
    if whole.keys() != parts.keys():
        return float("nan")
    return worst(abs(whole[key] - parts[key]) for key in whole)


def _against_reference(name: str, seed: int, gap: float) -> tuple[float, float]:
    """Errors of value and gradient, with the reference's own weights."""
    cfg, case = config(name), make_case(seed, gap=gap)
    batch = credited(case, cfg)
    assert batch.advantage_BT is not None

    def weights(mask_BT: torch.Tensor) -> torch.Tensor:
        found = reference.weights(mask_BT.tolist(), batch.group_id_B.tolist(), cfg, MAX_LENGTH)
        return torch.tensor(found, dtype=torch.float64)

    batch = batch.replace(weight_BT=weights(batch.mask_BT))
    if averages_over_accepted(name):
        mask_BT = batch.mask_BT * (batch.advantage_BT != 0)
        batch = batch.replace(policy_weight_BT=weights(mask_BT))
    loss, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
    expected, expected_BT = reference.loss_and_gradient(loss_inputs(case.logp_BT, batch, cfg), cfg)
    return difference(loss, expected), difference(gradient_BT, expected_BT)
