"""Waypoints to tokens and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign.tasks.driving import Codebook
from rlalign.tasks.errors import TaskError

BOOKS = [Codebook(), Codebook(99.9, 0.3), Codebook(50.0, 0.1), Codebook(4.0, 4.0)]


@pytest.mark.parametrize("book", BOOKS)
def test_every_token_survives_the_way_there_and_back(book):
    ids = torch.arange(book.size)
    pairs = torch.stack([ids, ids.flip(0)], -1).flatten()
    assert torch.equal(book.encode(book.decode(pairs)), pairs)


def test_sizes():
    assert [book.size for book in BOOKS] == [401, 667, 1001, 3]


@given(st.lists(st.floats(-50, 50), min_size=16, max_size=16), st.sampled_from((0.1, 0.25, 0.4)))
def test_no_coordinate_moves_by_more_than_half_a_step(values, step):
    book, points = Codebook(50.0, step), np.array(values).reshape(8, 2)
    assert np.abs(book.decode(book.encode(points)) - points).max() <= step / 2 + 1e-9
    assert book.count_clipped(points) == 0


def test_what_is_outside_goes_to_the_border_and_is_counted():
    points = np.array([[60.0, 3.0], [-1e9, 50.0], [10.0, 10.0]])
    book = Codebook()
    assert np.array_equal(book.decode(book.encode(points)), [[50, 3], [-50, 50], [10, 10]])
    assert book.count_clipped(points) == 2


def test_the_order_of_a_plan_s_tokens():
    ids = Codebook(2.0, 1.0).encode(np.array([[[-2.0, -1.0], [0.0, 2.0]]]))
    assert ids.tolist() == [[0, 1, 2, 4]] and ids.dtype == torch.int64


@pytest.mark.parametrize(
    "sizes", [(50, 0.3), (50, 0), (50, -1), (0, 0.25), (0.1, 0.25), (np.inf, 1), (50, np.nan)]
)
def test_a_malformed_codebook(sizes):
    with pytest.raises(TaskError):
        Codebook(*sizes)


def test_what_is_no_plan_is_refused():
    book = Codebook()
    with pytest.raises(TaskError, match="finite"):
        book.encode(np.array([[np.nan, 0.0]]))
    for ids in ([401, 0], [-1, 0]):  # the mask token is 401
        with pytest.raises(TaskError, match="filled"):
            book.decode(torch.tensor(ids))
    with pytest.raises(TaskError, match="pairs"):
        book.decode(torch.tensor([1, 2, 3]))


def test_a_moved_waypoint_takes_those_after_it_along_and_half_the_one_before():
    book = Codebook(10.0, 1.0)  # 21 tokens
    plan = torch.tensor([10, 10, 12, 10, 14, 10, 16, 10])
    moved = book.shift(plan, 2, torch.tensor([[14, 10], [17, 6], [11, 11]]))
    assert moved.tolist() == [
        plan.tolist(),
        [10, 10, 13, 8, 17, 6, 19, 6],  # +3 is half +1, -4 is half -2
        [10, 10, 11, 10, 11, 11, 13, 11],  # -3 is half -1, +1 is half 0
    ]
    first = book.shift(plan, 0, torch.tensor([[20, 0]]))
    assert first.tolist() == [[20, 0, 20, 0, 20, 0, 20, 0]]  # the border holds them
    assert plan.tolist() == [10, 10, 12, 10, 14, 10, 16, 10]
