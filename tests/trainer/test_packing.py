"""Properties of micro-batch plans, for any lengths."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.trainer.packing import Row, micro_batches

MAX_PROMPT = 60


@st.composite
def row_lists(draw):
    """Groups of rows with a prompt each, mixed."""
    rows = []
    for key in range(draw(st.integers(0, 12))):
        prompt = draw(st.integers(1, MAX_PROMPT))
        completions = draw(st.lists(st.integers(0, 140), min_size=1, max_size=8))
        rows += [Row(prompt + length, key, prompt) for length in completions]
    return draw(st.permutations(rows))


plans = given(rows=row_lists(), max_tokens=st.integers(1, 500), num_ranks=st.integers(1, 5))


def alone(lengths):
    """Rows that share nothing."""
    return [Row(length, key, 1) for key, length in enumerate(lengths)]


def load(part, rows):
    """Tokens through the model: every row's completion, every different prompt once."""
    total, seen = 0, set()
    for i in part:
        total += rows[i].tokens - rows[i].prompt_tokens
        if rows[i].key not in seen:
            total += rows[i].prompt_tokens
            seen.add(rows[i].key)
    return total


@settings(max_examples=200, deadline=None)
@plans
def test_every_row_runs_exactly_once(rows, max_tokens, num_ranks):
    plan = micro_batches(rows, max_tokens, num_ranks)
    assert sorted(i for rank in plan for part in rank for i in part) == list(range(len(rows)))


@settings(max_examples=200, deadline=None)
@plans
def test_only_a_row_alone_may_pass_the_limit(rows, max_tokens, num_ranks):
    for rank in micro_batches(rows, max_tokens, num_ranks):
        for part in rank:
            assert len(part) <= 1 or load(part, rows) <= max_tokens


@settings(max_examples=200, deadline=None)
@plans
def test_processes_run_equally_often_and_no_oftener_than_needed(rows, max_tokens, num_ranks):
    plan = micro_batches(rows, max_tokens, num_ranks)
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1 and len(plan) == num_ranks
    fullest = max(sum(1 for part in rank if part) for rank in plan)
    assert counts == {fullest}


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), max_size=60),
    max_tokens=st.integers(1, 500),
    num_ranks=st.integers(1, 5),
)
def test_the_fullest_process_has_at_most_one_row_over_its_share(lengths, max_tokens, num_ranks):
    rows = alone(lengths)
    plan = micro_batches(rows, max_tokens, num_ranks)
    loads = [sum(load(part, rows) for part in rank) for rank in plan]
    assert max(loads) <= sum(lengths) / num_ranks + max(lengths, default=0)


@settings(max_examples=200, deadline=None)
@plans
def test_sharing_prompts_never_costs_the_fullest_process_tokens(rows, max_tokens, num_ranks):
    """Compared with the plan of the same rows with nothing to share."""
    apart = [Row(row.tokens, key, row.prompt_tokens) for key, row in enumerate(rows)]

    def fullest(rows):
        plan = micro_batches(rows, 10**9, num_ranks)
        return max(load([i for part in rank for i in part], rows) for rank in plan)

    assert fullest(rows) <= fullest(apart)


@settings(max_examples=200, deadline=None)
@plans
def test_at_most_about_twice_the_ideal_number_of_passes(rows, max_tokens, num_ranks):
    [plan] = micro_batches(rows, max_tokens)
    assert max(len(plan) - 1, 0) * max_tokens <= 2 * sum(row.tokens for row in rows)


def test_a_group_stays_together_and_its_prompt_counts_once():
    rows = [Row(9, key, 6) for _ in range(4) for key in (0, 1)]  # 6 + 4 x 3 tokens a group
    assert micro_batches(rows, 18) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    assert micro_batches(rows, 100, num_ranks=2) == [[[0, 2, 4, 6]], [[1, 3, 5, 7]]]


def test_one_large_group_is_shared_out():
    rows = [Row(110, 0, 10)] * 16
    loads = [load(rank[0], rows) for rank in micro_batches(rows, 10_000, num_ranks=4)]
    assert loads == [410] * 4


def test_similar_lengths_travel_together():
    parts = micro_batches(alone([10, 90, 12, 88, 11, 91]), 190)[0]
    assert parts == [[5, 1], [3, 2, 4, 0]]


def test_runs_of_one_process_are_even():
    sizes = [len(part) for part in micro_batches(alone([10] * 12), 100)[0]]
    assert sizes == [6, 6]


def test_no_rows_need_no_pass():
    assert micro_batches([], 100, 3) == [[], [], []]


@pytest.mark.parametrize(("max_tokens", "num_ranks"), [(0, 1), (10, 0)])
def test_limits_below_one_are_refused(max_tokens, num_ranks):
    with pytest.raises(ValueError, match="at least 1"):
        micro_batches(alone([1]), max_tokens, num_ranks)
