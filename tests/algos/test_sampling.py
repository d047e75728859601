"""Dynamic sampling: which groups count, when it ends, what it says, and going on after a crash."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import algos
from rlalign.algos import AlgoError, DynamicSampler, SamplingExhausted, has_signal
from rlalign.config import AlgoConfig


def cfg(enable=True, budget=4, on_exhausted="error", **fields) -> AlgoConfig:
    config = AlgoConfig(loss_type="dapo", **fields)
    groups = dataclasses.replace(
        config.filter_groups,
        enable=enable,
        max_num_gen_batches=budget,
        on_exhausted=on_exhausted,
    )
    return algos.resolve(dataclasses.replace(config, filter_groups=groups))


@pytest.mark.parametrize(
    ("values", "signal"),
    [
        ([0, 1], True),
        ([1, 1, 1], False),
        ([0.98] * 12, False),
        ([math.nan, 1.0], False),
        ([math.nan, 1.0, 0.0], True),
        ([math.inf, 1.0], False),
        ([1.0], False),
        ([], False),
    ],
)
def test_signal_means_two_different_usable_values(values, signal):
    assert has_signal(values) is signal


def test_prompts_without_samples_are_not_blamed_on_the_reward():
    sampler = DynamicSampler(2, cfg(budget=1))
    with pytest.raises(SamplingExhausted) as caught:
        sampler.feed([[], [0.0, 0.0], [], [math.nan], []])
    for part in ("1 without a usable acc, 3 without samples", "0.000 on average", "allocator"):
        assert part in str(caught.value)


def test_a_group_of_one_counts_only_with_its_raw_reward():
    assert has_signal([0.3], singleton_advantage="raw")
    assert not has_signal([math.nan], singleton_advantage="raw")


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(1, 6),
)
def test_never_too_many_never_without_signal_never_over_budget(groups, target, budget):
    sampler = DynamicSampler(target, cfg(budget=budget, on_exhausted="train"))
    cursor, kept, rounds = 0, [], 0
    while sampler.needed:
        assert 1 <= sampler.next_prompts <= target
        part = [groups[(cursor + i) % len(groups)] for i in range(sampler.next_prompts)]
        cursor, rounds = cursor + len(part), rounds + 1
        selection = sampler.feed(part)
        assert not set(selection.kept) & set(selection.surplus)
        kept += [part[i] for i in selection.kept]
        assert all(0 < sum(part[i]) < len(part[i]) for i in selection.kept + selection.surplus)
    assert rounds <= budget
    assert len(kept) == target or (rounds == budget and len(kept) < target)
    assert sampler.exhausted == (len(kept) < target)


def test_the_next_round_asks_for_what_the_pass_rate_suggests():
    sampler = DynamicSampler(8, cfg())
    assert sampler.next_prompts == 8
    sampler.feed([[0, 1]] * 6 + [[1, 1]] * 2)
    assert sampler.needed == 2
    assert sampler.next_prompts == 3  # 2 / (7/9), rounded up


def test_without_the_filter_every_group_is_kept():
    sampler = DynamicSampler(2, cfg(enable=False))
    assert sampler.feed([[1, 1], [0]]).kept == (0, 1)
    assert not sampler.needed


def test_feeding_a_complete_batch_is_an_error():
    sampler = DynamicSampler(1, cfg())
    sampler.feed([[0, 1]])
    with pytest.raises(AlgoError, match="complete"):
        sampler.feed([[0, 1]])


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([[1, 1]] * 3 + [[0, 1]], "too easy"),
        ([[0, 0]] * 3 + [[0, 1]], "too hard"),
        ([[math.nan, math.nan]] * 4, "rewards/errors"),
    ],
)
def test_a_spent_budget_ends_with_what_was_seen_and_what_to_change(groups, says):
    sampler = DynamicSampler(4, cfg(budget=1))
    with pytest.raises(SamplingExhausted, match=says) as caught:
        sampler.feed(groups)
    message = str(caught.value)
    assert "of 4 groups with signal in 1 rollouts of 4 groups" in message
    if "rewards/errors" not in message:
        assert "on average" in message and "algo.filter_groups.on_exhausted=train" in message


def test_pass_rates_in_the_message_are_those_fed():
    sampler = DynamicSampler(9, cfg(budget=1))
    with pytest.raises(SamplingExhausted, match=r"0\.500 on average, 0\.250 to 0\.750"):
        sampler.feed([[0, 0, 0, 1], [1, 1, 0, 1]])


def test_training_on_what_was_found_ends_without_an_error():
    sampler = DynamicSampler(4, cfg(budget=2, on_exhausted="train"))
    assert sampler.feed([[1, 1], [0, 1]]).kept == (1,)
    assert sampler.feed([[1, 1]]).kept == ()
    assert sampler.needed == 0 and sampler.exhausted
    assert sampler.metrics()["sampling/groups_generated"] == 3
    assert sampler.metrics()["sampling/groups_used"] == 1


def test_a_sampler_restored_from_json_goes_on_as_if_nothing_happened():
    rounds = [[[0, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 1], [0, 1], [1, 0]]]
    straight, resumed = DynamicSampler(3, cfg()), DynamicSampler(3, cfg())
    for groups in rounds:
        expected = straight.feed(groups)
        state = json.loads(json.dumps(resumed.state_dict(), allow_nan=False))
        resumed = DynamicSampler(3, cfg())
        resumed.load_state_dict(state)
        assert resumed.feed(groups) == expected
    assert resumed.metrics() == straight.metrics()
    assert resumed.describe() == straight.describe()


def test_a_foreign_state_is_refused():
    with pytest.raises(AlgoError, match="unknown keys: cursor"):
        DynamicSampler(3, cfg()).load_state_dict({"cursor": 3})
