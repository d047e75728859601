"""Overlong punishment, gradient masks, group-normalised sums, reward figures."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign import algos
from rlalign.algos import AlgoError
from rlalign.config.schema import AlgoConfig, OverlongConfig

CFG = algos.resolve(AlgoConfig())


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 10), st.integers(0, 700))
def test_overlong_punishment_of_any_length(limit, buffer, factor, length):
    buffer = min(buffer, limit)
    penalty = float(algos.overlong_penalty(torch.tensor([length]), limit, buffer, factor))
    if length <= limit - buffer:
        assert penalty == 0.0
    elif length <= limit:
        assert penalty == pytest.approx(-(length - (limit - buffer)) / buffer * factor, rel=1e-5)
    else:
        assert penalty == pytest.approx(-factor)


def test_the_published_setting():
    """DAPO: limit 20480, buffer 4096: free up to 16384, half way at 18432, -1 at the limit."""
    length_B = torch.tensor([16384, 18432, 20480, 30000])
    found = algos.overlong_penalty(length_B, 20480, 4096, 1.0)
    assert found.tolist() == [0.0, -0.5, -1.0, -1.0]


def test_a_buffer_of_zero_is_off_and_one_over_the_limit_is_an_error():
    assert algos.overlong_penalty(torch.tensor([999]), 10, 0, 1.0).tolist() == [0.0]
    with pytest.raises(AlgoError, match=r"overlong\.buffer_len=11"):
        algos.overlong_penalty(torch.tensor([5]), 10, 11, 1.0)


def test_masks_of_unscorable_and_truncated_rows():
    mask_BT = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    reward_B, truncated_B = torch.tensor([math.nan, 0.0, 1.0]), torch.tensor([False, True, False])
    kept = algos.gradient_mask(mask_BT, reward_B, truncated_B, CFG)
    assert kept.tolist() == [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    drop = algos.resolve(AlgoConfig(overlong=OverlongConfig(mask_truncated_completions=True)))
    kept = algos.gradient_mask(mask_BT, reward_B, truncated_B, drop)
    assert kept.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


def test_normalising_first_makes_functions_of_any_scale_count_the_same():
    group_id_B = torch.tensor([0, 1, 0, 1, 0, 1])
    values = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    small, large = values * 1e-2, values * 1e4 + 17
    both = algos.normalize_then_sum({"a": small, "b": -large}, [1.0, 1.0], group_id_B, adv_eps=0.0)
    torch.testing.assert_close(both, torch.zeros(6), rtol=0, atol=1e-5)


def test_a_function_that_does_not_apply_adds_nothing_and_nothing_applying_is_nan():
    group_id_B = torch.tensor([0, 0, 0])
    a = torch.tensor([1.0, 0.0, math.nan])
    b = torch.tensor([5.0, 5.0, math.nan])
    found = algos.normalize_then_sum({"a": a, "b": b}, [2.0, 3.0], group_id_B)
    expected = 2 * 0.5 / (math.sqrt(0.5) + 1e-6)
    assert found[:2].tolist() == pytest.approx([expected, -expected], rel=1e-6)
    assert math.isnan(found[2])


def test_a_weight_for_every_function_is_required():
    with pytest.raises(ValueError, match="zip"):
        algos.normalize_then_sum({"a": torch.zeros(2)}, [1.0, 2.0], torch.tensor([0, 0]))


def test_reward_figures_count_groups_that_can_be_compared():
    reward_B = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, math.nan, 0.25])
    group_id_B = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    found = algos.finalize_metrics(algos.reward_metrics(reward_B, group_id_B, CFG))
    assert found["reward"] == pytest.approx(3.75 / 6)
    assert found["frac_reward_zero_std"] == pytest.approx(1 / 2)  # groups 0 and 1 are comparable
    assert found["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
