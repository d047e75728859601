"""Advantages against loops, on groups of every size and order, with every kind of reward."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import algos
from rlalign.algos import AlgoError
from rlalign.config import AlgoConfig

FLAT = [n for n in algos.names() if algos.get(n).defaults.get("adv_estimator") != "tree"]
REWARDS = st.sampled_from([0.0, 1.0, 0.5, -1.0, 0.98, math.nan, math.inf, -math.inf])


def cfg(loss_type="grpo", **fields) -> AlgoConfig:
    return algos.resolve(AlgoConfig(loss_type=loss_type, **fields))


def advantage(reward, group, config, mask=None, kl=None):
    reward_B = torch.tensor(reward, dtype=torch.float32)
    mask_BT = torch.ones(len(reward), 1) if mask is None else torch.tensor(mask)
    kl_BT = None if kl is None else torch.tensor(kl)
    return algos.compute_advantages(
        reward_B, reward_B, torch.tensor(group), mask_BT, config, kl_BT=kl_BT
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(REWARDS, st.integers(-3, 3)), min_size=1, max_size=14))
def test_grpo_on_any_groups(rows):
    reward, group = [r for r, _ in rows], [g for _, g in rows]
    ours = advantage(reward, group, cfg(beta=0.0))[:, 0].tolist()
    for i, (r, g) in enumerate(rows):
        peers = [x for x, h in rows if h == g and math.isfinite(x)]
        if not math.isfinite(r) or len(set(peers)) < 2:
            assert ours[i] == 0.0
        else:
            peers32 = torch.tensor(peers).tolist()
            expected = (torch.tensor(r).item() - statistics.mean(peers32)) / (
                statistics.stdev(peers32) + 1e-6
            )
            assert ours[i] == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(REWARDS, st.integers(0, 2)), min_size=1, max_size=10),
    st.randoms(use_true_random=False),
    st.sampled_from(
        ["grpo", "rloo", "dr_grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
    ),
)
def test_order_and_labels_of_groups_are_immaterial(rows, random, name):
    order = list(range(len(rows)))
    random.shuffle(order)
    config = cfg(name, beta=0.0)
    before = advantage([r for r, _ in rows], [g for _, g in rows], config)
    after = advantage([rows[i][0] for i in order], [40 - 7 * rows[i][1] for i in order], config)
    torch.testing.assert_close(after, before[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FLAT)
def test_nothing_scorable_gives_zeros(name):
    config = cfg(name) if name == "copg" else cfg(name, beta=0.0)
    found = advantage([math.nan, math.inf, -math.inf], [0, 0, 1], config, mask=[[1.0, 1.0]] * 3)
    assert found.tolist() == [[0.0, 0.0]] * 3


def test_a_group_left_with_one_scorable_sample_is_a_group_of_one():
    found = advantage([1.0, math.nan], [0, 0], cfg())
    assert found[:, 0].tolist() == [0.0, 0.0]
    found = advantage([1.0, math.nan], [0, 0], cfg(singleton_advantage="raw"))
    assert found[:, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_are_exactly_zero_even_without_epsilon(scale):
    config = cfg(scale_rewards=scale, adv_eps=0.0)
    found = advantage([0.98] * 12 + [0.1, 0.3], [0] * 12 + [1, 1], config)
    assert found[:12, 0].tolist() == [0.0] * 12
    assert found[12, 0] < 0 < found[13, 0]


def test_the_tie_tolerance_is_relative():
    loose = cfg(reward_tie_tol=1e-3)
    assert advantage([1000.0, 1000.5], [0, 0], loose)[:, 0].tolist() == [0.0, 0.0]
    assert advantage([0.1, 0.6], [0, 0], loose)[0, 0] < 0


def test_kl_in_the_reward_of_a_sequence_is_the_sum_over_its_tokens():
    config = cfg("rloo", beta=0.5)
    mask = [[1.0, 1.0], [1.0, 0.0]]
    kl = [[0.2, 0.4], [0.6, math.nan]]
    found = advantage([1.0, 0.0], [0, 0], config, mask, kl)
    # R = (1 - .5 * .6, 0 - .5 * .6); leave-one-out difference 1.0
    assert found[:, 0].tolist() == pytest.approx([1.0, -1.0], abs=1e-6)
    assert found[1, 1] == 0.0


def test_reinforce_plus_plus_by_hand():
    """Two sequences; returns (1 - .1, 1), (0.2,) -> whitened with the sample variance."""
    config = cfg("reinforce_plus_plus", beta=0.5)
    found = advantage(
        [1.0, 0.2], [0, 1], config, [[1.0, 1.0], [1.0, 0.0]], [[0.2, 0.0], [0.0, 0.0]]
    )
    returns = [0.9, 1.0, 0.2]
    mean, variance = statistics.mean(returns), statistics.variance(returns)
    expected = [(g - mean) / math.sqrt(variance + 1e-8) for g in returns]
    flat = [found[0, 0].item(), found[0, 1].item(), found[1, 0].item()]
    assert flat == pytest.approx(expected, abs=1e-6)
    assert found[1, 1] == 0.0


def test_a_token_with_unusable_kl_makes_its_sequence_unscorable():
    config = cfg("rloo", beta=0.5)
    found = advantage([1.0, 0.0, 0.5], [0, 0, 0], config, [[1.0]] * 3, [[math.inf], [0.0], [0.0]])
    assert found[:, 0].tolist() == pytest.approx([0.0, -0.5, 0.5])


def test_kl_in_the_reward_without_its_values_is_an_error():
    with pytest.raises(AlgoError, match="needs kl_BT"):
        advantage([1.0, 0.0], [0, 0], cfg("rloo"))


def test_an_unresolved_config_is_an_error():
    with pytest.raises(AlgoError, match="resolve"):
        advantage([1.0, 0.0], [0, 0], AlgoConfig())


def test_advantages_carry_no_gradient_and_at_least_float32():
    reward_B = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    found = algos.compute_advantages(
        reward_B, reward_B, torch.tensor([0, 0]), torch.ones(2, 3), cfg()
    )
    assert found.dtype == torch.float32 and not found.requires_grad
