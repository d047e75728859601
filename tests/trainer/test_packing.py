"""Properties of micro-batch plans, for any rows."""

from __future__ import annotations

import random
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.trainer.packing import Row, load, micro_batches


class Case(list):
    """Rows as a plan takes them, and their tokens."""

    tokens: list[tuple[int, ...]]


@st.composite
def cases(draw):
    """Prompts, some with a beginning in common, each with rows that branch off one another."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    keyed = []
    for key in range(draw(st.integers(0, 10))):
        prompt = (0,) * rng.randint(0, 12) + (key + 1,) * rng.randint(1, 12)
        rows = [prompt]
        for _ in range(draw(st.integers(1, 8))):
            kept = rng.choice(rows)[: rng.randint(len(prompt), 60)]
            rows.append(kept + tuple(rng.randint(100, 102) for _ in range(rng.randint(0, 25))))
        keyed += [(row, key) for row in rows[1:]]
    keyed.sort(reverse=True)
    case = Case()
    case.tokens = [row for row, _ in keyed]
    for (row, key), (before, _) in zip(keyed, [((), 0), *keyed], strict=False):
        same = takewhile(lambda pair: pair[0] == pair[1], zip(row, before, strict=False))
        case.append(Row(len(row), key, len(list(same))))
    return case


plans = given(rows=cases(), max_tokens=st.integers(1, 200), num_ranks=st.integers(1, 5))


def alone(lengths):
    """Rows that share nothing."""
    return [Row(length, key, 0) for key, length in enumerate(lengths)]


def nodes(part, case):
    """Of the tree of all beginnings of the rows."""
    root, count = {}, 0
    for i in part:
        here = root
        for token in case.tokens[i]:
            count += token not in here
            here = here.setdefault(token, {})
    return count


@settings(max_examples=200, deadline=None)
@given(rows=cases(), seed=st.integers(0, 2**32))
def test_any_rows_together_run_the_tokens_of_their_tree(rows, seed):
    part = [i for i in range(len(rows)) if random.Random(seed + i).random() < 0.4]
    assert load(part, rows) == nodes(part, rows)


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
            assert len(part) <= 1 or nodes(part, rows) <= max_tokens


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
    loads = [sum(rows[i].tokens for part in rank for i in part) for rank in plan]
    assert max(loads) <= sum(lengths) / num_ranks + max(lengths, default=0)


@settings(max_examples=200, deadline=None)
@plans
def test_knowing_what_is_shared_never_costs_the_fullest_process_tokens(rows, max_tokens, num_ranks):
    """Compared with the plan of the same rows made as if nothing were."""

    def fullest(given):
        plan = micro_batches(given, 10**9, num_ranks)
        return max(nodes([i for part in rank for i in part], rows) for rank in plan)

    assert fullest(rows) <= fullest(alone(row.tokens for row in rows))


@settings(max_examples=200, deadline=None)
@plans
def test_at_most_about_twice_the_ideal_number_of_passes(rows, max_tokens, num_ranks):
    [plan] = micro_batches(rows, max_tokens)
    assert max(len(plan) - 1, 0) * max_tokens <= 2 * sum(row.tokens for row in rows)


def test_a_group_stays_together_and_its_prompt_counts_once():
    rows = [Row(9, i // 4, 6 if i % 4 else 0) for i in range(8)]  # 6 + 4 x 3 tokens a group
    assert micro_batches(rows, 18) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert micro_batches(rows, 100, num_ranks=2) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_one_large_group_is_shared_out():
    rows = [Row(110, 0, 0), *[Row(110, 0, 10)] * 15]
    loads = [load(rank[0], rows) for rank in micro_batches(rows, 10_000, num_ranks=4)]
    assert loads == [410] * 4


def test_neighbours_travel_together():
    parts = micro_batches(alone([91, 90, 88, 12, 11, 10]), 190)[0]
    assert parts == [[0, 1], [2, 3, 4, 5]]


def test_runs_of_one_process_are_even():
    sizes = [len(part) for part in micro_batches(alone([10] * 12), 100)[0]]
    assert sizes == [6, 6]


def test_no_rows_need_no_pass():
    assert micro_batches([], 100, 3) == [[], [], []]


@pytest.mark.parametrize(("max_tokens", "num_ranks"), [(0, 1), (10, 0)])
def test_limits_below_one_are_refused(max_tokens, num_ranks):
    with pytest.raises(ValueError, match="at least 1"):
        micro_batches(alone([1]), max_tokens, num_ranks)
