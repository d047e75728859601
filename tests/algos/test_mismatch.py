"""Weights between engine and trainer, by hand, and their mean over several processes."""

import dataclasses
import math

import pytest
import torch

from rlalign import algos
from rlalign.config import AlgoConfig

OLD_BT = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, math.nan]])
ROLLOUT_BT = torch.tensor([[-1.5, -0.8, -1.0], [-2.0, -1.2, math.nan]])
MASK_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def weights(**mismatch) -> list[list[float]]:
    config = AlgoConfig()
    config = dataclasses.replace(config, mismatch=dataclasses.replace(config.mismatch, **mismatch))
    return algos.rollout_weights(OLD_BT, ROLLOUT_BT, MASK_BT, algos.resolve(config)).tolist()


def expected(rows) -> list:
    return [pytest.approx(row, rel=1e-6) for row in rows]


E = math.exp


@pytest.mark.parametrize(
    ("mismatch", "rows"),
    [
        ({"rollout_is": "token"}, [[E(0.5), E(-0.2), 1], [2, E(0.2), 0]]),
        (
            {"rollout_is": "token", "rollout_is_mode": "mask"},
            [[E(0.5), E(-0.2), 1], [0, E(0.2), 0]],
        ),
        ({"rollout_is": "sequence"}, [[E(0.3)] * 3, [2, 2, 0]]),
        ({"rollout_is": "sequence", "rollout_is_mode": "mask"}, [[E(0.3)] * 3, [0, 0, 0]]),
        (
            {"rollout_is": "sequence_geomean", "rollout_is_mode": "mask"},
            [[E(0.1)] * 3, [E(0.6), E(0.6), 0]],
        ),
        (
            {"rollout_is": "seq_mask_tis", "rollout_is_max": 1.5},
            [[1.5, E(-0.2), 1], [0, 0, 0]],  # geometric means exp(.1) and exp(.6) = 1.82
        ),
    ],
)
def test_weights_by_hand(mismatch, rows):
    assert weights(**mismatch) == expected(rows)


def test_the_batch_mean_runs_over_all_processes():
    config = AlgoConfig()
    mismatch = dataclasses.replace(
        config.mismatch, rollout_is="token", rollout_is_batch_normalize=True
    )
    config = algos.resolve(dataclasses.replace(config, mismatch=mismatch))
    whole_BT = algos.rollout_weights(OLD_BT, ROLLOUT_BT, MASK_BT, config)
    sums = []
    for i in range(2):
        algos.rollout_weights(
            OLD_BT[i : i + 1],
            ROLLOUT_BT[i : i + 1],
            MASK_BT[i : i + 1],
            config,
            all_reduce=lambda local: sums.append(local) or local,
        )
    for i in range(2):
        part_BT = algos.rollout_weights(
            OLD_BT[i : i + 1],
            ROLLOUT_BT[i : i + 1],
            MASK_BT[i : i + 1],
            config,
            all_reduce=lambda _: sums[0] + sums[1],
        )
        torch.testing.assert_close(part_BT[0], whole_BT[i])


def test_a_batch_whose_weights_are_all_masked_stays_zero():
    found = weights(
        rollout_is="sequence",
        rollout_is_mode="mask",
        rollout_is_max=1.0,
        rollout_is_min=1.0,
        rollout_is_batch_normalize=True,
    )
    assert found == [[0.0] * 3] * 2
