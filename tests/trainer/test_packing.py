"""Properties of micro-batch plans, for any lengths."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.trainer.packing import micro_batches

plans = given(
    lengths=st.lists(st.integers(1, 200), max_size=60),
    max_tokens=st.integers(1, 500),
    num_ranks=st.integers(1, 5),
)


@settings(max_examples=200, deadline=None)
@plans
def test_every_row_runs_exactly_once(lengths, max_tokens, num_ranks):
    plan = micro_batches(lengths, max_tokens, num_ranks)
    rows = [row for rank in plan for part in rank for row in part]
    assert sorted(rows) == list(range(len(lengths)))


@settings(max_examples=200, deadline=None)
@plans
def test_only_a_row_alone_may_pass_the_limit(lengths, max_tokens, num_ranks):
    for rank in micro_batches(lengths, max_tokens, num_ranks):
        for part in rank:
            assert len(part) <= 1 or sum(lengths[i] for i in part) <= max_tokens


@settings(max_examples=200, deadline=None)
@plans
def test_processes_run_equally_often_and_no_oftener_than_needed(lengths, max_tokens, num_ranks):
    plan = micro_batches(lengths, max_tokens, num_ranks)
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1 and len(plan) == num_ranks
    fullest = max(sum(1 for part in rank if part) for rank in plan)
    assert counts == {fullest}


@settings(max_examples=200, deadline=None)
@plans
def test_processes_differ_by_at_most_one_row(lengths, max_tokens, num_ranks):
    plan = micro_batches(lengths, max_tokens, num_ranks)
    loads = [sum(lengths[i] for part in rank for i in part) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@settings(max_examples=200, deadline=None)
@plans
def test_two_neighbouring_micro_batches_would_not_fit_into_one(lengths, max_tokens, num_ranks):
    """At most about twice the ideal number of passes on the process that sets the count."""
    plan = micro_batches(lengths, max_tokens, 1)[0]
    assert max(len(plan) - 1, 0) * max_tokens <= 2 * sum(lengths)


def test_similar_lengths_travel_together():
    lengths = [10, 90, 12, 88, 11, 91]
    parts = micro_batches(lengths, 190)[0]
    assert parts == [[5, 1], [3, 2, 4, 0]]


def test_runs_of_one_process_are_even():
    sizes = [len(part) for part in micro_batches([10] * 12, 100)[0]]
    assert sizes == [6, 6]


def test_the_plan_depends_on_nothing_but_the_lengths():
    lengths = [5, 5, 7, 7, 1]
    assert micro_batches(lengths, 10, 2) == micro_batches(tuple(lengths), 10, 2)


def test_no_rows_need_no_pass():
    assert micro_batches([], 100, 3) == [[], [], []]


@pytest.mark.parametrize(("max_tokens", "num_ranks"), [(0, 1), (10, 0)])
def test_limits_below_one_are_refused(max_tokens, num_ranks):
    with pytest.raises(ValueError, match="at least 1"):
        micro_batches([1], max_tokens, num_ranks)
