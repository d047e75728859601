"""The batch layout against plain loops, and which samples may train."""

import math

import pytest
import torch

from rlalign import algos
from rlalign.config.schema import AlgoConfig, OverlongConfig
from rlalign.trainer.batch import StaleSampleError, check_versions, make_train_batch
from rlalign.types import Group, Prompt, Sample, Scores, VersionSpan

ALGO = algos.resolve(AlgoConfig(), engine_shares_parameters=True)


def sample(index: int, tokens: tuple[int, ...], finish: str = "stop", version: int = 4) -> Sample:
    logp = tuple(-0.1 * t for t in tokens)
    return Sample("p", index, tokens, logp, finish, (VersionSpan(len(tokens), version),))


GROUPS = [
    Group(Prompt("p", (9, 8), "p"), (sample(0, (1, 2, 3)), sample(1, (4,), "length"))),
    Group(Prompt("q", (7,), "q"), (sample(0, (5, 6), "abort"),)),
    Group(Prompt("p", (9, 8), "p"), (sample(2, (1, 1)),)),
]


def scores(*reward: float) -> Scores:
    return Scores(torch.tensor(reward), torch.tensor(reward))


def test_rows_hold_prompt_and_completion_and_each_log_prob_at_its_place():
    batch = make_train_batch(GROUPS, scores(1.0, 0.0, 1.0, 0.5), ALGO)
    assert batch.sequences == ((9, 8, 1, 2, 3), (9, 8, 4), (7, 5, 6), (9, 8, 1, 1))
    assert batch.group_id_B.tolist() == [0, 0, 1, 2]  # the same prompt twice: two occurrences
    expected = [[-0.1, -0.2, -0.3], [-0.4, 0, 0], [-0.5, -0.6, 0], [-0.1, -0.1, 0]]
    torch.testing.assert_close(batch.logp_rollout_BT, torch.tensor(expected))
    assert batch.mask_BT.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_aborted_samples_enter_no_group_statistic():
    batch = make_train_batch(GROUPS, scores(1.0, 0.0, 1.0, 0.5), ALGO)
    assert math.isnan(batch.reward_B[2])


def test_truncated_samples_keep_their_reward_and_lose_their_gradient():
    algo = algos.resolve(AlgoConfig(overlong=OverlongConfig(mask_truncated_completions=True)))
    batch = make_train_batch(GROUPS, scores(1.0, 0.25, 1.0, 0.5), algo)
    assert batch.mask_BT[1].sum() == 0 and batch.reward_B[1] == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_masks_its_row_only(bad):
    batch = make_train_batch(GROUPS, scores(bad, 0.0, 1.0, 0.5), ALGO)
    assert batch.mask_BT.sum(1).tolist() == [0, 1, 0, 2]


def test_rows_picks_and_cuts():
    batch = make_train_batch(GROUPS, scores(1.0, 0.0, 1.0, 0.5), ALGO).rows([3, 1])
    assert batch.sequences == ((9, 8, 1, 1), (9, 8, 4))
    assert batch.mask_BT.tolist() == [[1, 1], [1, 0]]


def test_a_missing_reward_is_an_error():
    with pytest.raises(ValueError, match="4 samples but 3 rewards"):
        make_train_batch(GROUPS, scores(1.0, 0.0, 1.0), ALGO)


def test_samples_of_an_unpublished_version_are_refused():
    check_versions(GROUPS, {4})
    with pytest.raises(StaleSampleError, match=r"version \[4\]; published and allowed now: \[5\]"):
        check_versions(GROUPS, {5})
