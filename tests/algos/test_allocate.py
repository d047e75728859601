"""Budgets to whole numbers: exact sums, golden values, optimality against brute force."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign.algos import AlgoError
from rlalign.algos.allocate import ROUNDINGS, allocate, variance_ratio
from rlalign.algos.gvm import gvm_weights

RATES = torch.tensor([1, 0.5, 0.25, 0.125], dtype=torch.float64)
WEIGHTS = gvm_weights(RATES, torch.ones(4))


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("largest_remainder", [5, 6, 9, 12]),
        ("low_accept_first", [4, 6, 9, 13]),
        ("optimal", [5, 6, 9, 12]),
    ],
)
def test_golden_values(rounding, expected):
    """G = 1, alpha = 1e-3, beta = 2, 32 samples at accept rates 1, 1/2, 1/4, 1/8."""
    assert allocate(WEIGHTS, 32, rounding, accept_rate_m=RATES).tolist() == expected
    assert variance_ratio(WEIGHTS) == pytest.approx(1.134452, abs=1e-6)


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=40).filter(
        any
    ),
    budget=st.integers(0, 500),
    rounding=st.sampled_from(ROUNDINGS),
    unit=st.integers(1, 5),
)
def test_sums_are_exact_shares_are_near_and_no_weight_is_no_sample(weights, budget, rounding, unit):
    weight_m = torch.tensor(weights, dtype=torch.float64)
    count_m = allocate(
        weight_m, budget, rounding, unit=unit, accept_rate_m=torch.linspace(0, 1, len(weights))
    )
    assert int(count_m.sum()) == budget - budget % unit
    assert (count_m >= 0).all() and (count_m % unit == 0).all()
    assert not count_m[weight_m == 0].any()
    if rounding != "optimal":
        exact = [budget // unit * w / math.fsum(weights) for w in weights]
        near = zip(count_m.tolist(), exact, strict=True)
        assert all(abs(n / unit - x) < 1 + 1e-6 * x for n, x in near)


def test_optimal_is_what_trying_everything_finds():
    rng = random.Random(0)
    for _ in range(60):
        m, budget = rng.randint(1, 4), rng.randint(1, 10)
        weights = [rng.choice([0.3, 1.0, rng.random() + 0.01]) for _ in range(m)]
        count = allocate(torch.tensor(weights, dtype=torch.float64), budget, "optimal").tolist()

        def variance(counts, weights=weights) -> float:
            return sum(w * w / n if n else math.inf for n, w in zip(counts, weights, strict=True))

        if budget < m:  # infinite in any case: the largest get one each
            assert sorted(count) == [0] * (m - budget) + [1] * budget
            assert sum(n * w for n, w in zip(count, weights, strict=True)) == pytest.approx(
                sum(sorted(weights)[-budget:])
            )
            continue
        tried = itertools.product(range(budget + 1), repeat=m)
        best = min(variance(counts) for counts in tried if sum(counts) == budget)
        assert variance(count) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bounds_hold_and_the_rest_is_shared_by_weight(rounding):
    weight_m = torch.tensor([100.0, 8, 6, 4, 1e-3, 0], dtype=torch.float64)
    count = allocate(weight_m, 60, rounding, low=2, high=20, accept_rate_m=torch.rand(6)).tolist()
    assert sum(count) == 60
    assert count[0] == 20 and count[4] == count[5] == 2
    shares = [36 * w / 18 for w in (8, 6, 4)]
    assert all(abs(n - x) <= 1 for n, x in zip(count[1:4], shares, strict=True))


def test_equal_bounds_are_uniform():
    assert allocate(torch.rand(7), 28, low=4, high=4).tolist() == [4] * 7


@pytest.mark.parametrize(
    ("bounds", "says"),
    [({"low": 5}, "at 5 to 12"), ({"high": 3}, "at 0 to 3"), ({"low": 4, "high": 3}, "at 4 to 3")],
)
def test_bounds_that_cannot_be_kept_are_refused_with_the_numbers(bounds, says):
    with pytest.raises(AlgoError, match=says):
        allocate(torch.ones(4), 12 if "high" not in bounds else 13, **bounds)


def test_edges():
    assert allocate(torch.ones(3), 0).tolist() == [0, 0, 0]
    assert allocate(torch.tensor([2.0]), 9).tolist() == [9]
    assert allocate(torch.tensor([0, math.nan, math.inf, 2]), 5).tolist() == [0, 0, 0, 5]
    assert allocate(torch.ones(3), 1).tolist() == [1, 0, 0]
    with pytest.raises(AlgoError, match="all 2 weights are 0"):
        allocate(torch.zeros(2), 4)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_permuting_distinct_prompts_permutes_their_samples(rounding):
    weight_m = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rate_m = torch.linspace(0.01, 0.99, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    whole = allocate(weight_m, 217, rounding, accept_rate_m=rate_m)
    moved = allocate(weight_m[order], 217, rounding, accept_rate_m=rate_m[order])
    assert torch.equal(moved, whole[order])


def test_a_large_budget_leaves_no_rounding_error():
    weight_m = torch.full((3,), 0.1, dtype=torch.float64)
    assert allocate(weight_m, 3 * 10**6).tolist() == [10**6] * 3
