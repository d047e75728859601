"""Candidates: how many, which, in what order; givens never change."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.config.reflect import ReflectConfig
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.neighbourhoods import (
    Grammar,
    ManhattanBall,
    Place,
    SpanDelete,
    TopKAlternatives,
)
from rlalign.testtime.reflect import Reflector
from rlalign.testtime.session import Session, run_searches
from tests.testtime.worlds import HashModel, PairModel, RandomVerifier, blank, problem_of


def propose(neighbourhood, place: Place, model=None):
    model = model or HashModel()
    canvas = blank(len(place.ids_T), model.mask_id)
    problem = problem_of(canvas, RandomVerifier(1, 0, 1.0), len(place.ids_T))
    session = Session(problem, model.mask_id, ReflectConfig())
    return run_searches(model, [neighbourhood.propose(session, place)])[0], session


def place_at(*tokens: int, free: tuple[bool, ...] | None = None, reach: float = 1.0) -> Place:
    ids_T = torch.tensor(tokens)
    free_L = torch.tensor(free or (True,) * len(tokens))
    return Place(ids_T, torch.arange(len(tokens)), free_L, reach)


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(12, 50), st.integers(12, 50))
def test_a_ball_away_from_borders_has_all_its_points_once(delta, x, y):
    found, session = propose(ManhattanBall(63, delta), place_at(x, y))
    expected = {
        (x + a, y + b)
        for a, b in itertools.product(range(-delta, delta + 1), repeat=2)
        if abs(a) + abs(b) <= delta
    }
    assert len(found) == len(expected) == 2 * delta**2 + 2 * delta + 1
    assert {tuple(row) for row in found.ids_CL.tolist()} == expected
    assert found.ids_CL[0].tolist() == [x, y] and found.cost_C[0] == 0
    assert found.cost_C.tolist() == [
        abs(a - x) + abs(b - y) for a, b in found.ids_CL.tolist()
    ] and found.cost_C.tolist() == sorted(found.cost_C.tolist())
    assert session.forwards == 0


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(3, 9), st.data())
def test_at_a_border_candidates_are_clipped_and_each_is_there_once(delta, size, data):
    x, y = data.draw(st.integers(5, 4 + size)), data.draw(st.integers(5, 4 + size))
    found, _ = propose(ManhattanBall(size, delta, first_id=5), place_at(x, y))
    rows = [tuple(row) for row in found.ids_CL.tolist()]
    assert len(set(rows)) == len(rows) and (x, y) in rows
    assert all(5 <= token < 5 + size for row in rows for token in row)
    inside = {
        (a, b)
        for a, b in itertools.product(range(5, 5 + size), repeat=2)
        if abs(a - x) + abs(b - y) <= delta
    }
    assert set(rows) == inside


def test_the_lattice_and_its_refinement_have_the_sizes_of_the_paper_s_reading():
    ball = ManhattanBall(401, 10, stride=3)
    place = place_at(200, 100)
    coarse, _ = propose(ball, place)
    assert len(coarse) == 41 and [200, 100] in coarse.ids_CL.tolist()
    fine = ball.refine(place, torch.tensor([206, 97]))
    assert fine is not None and len(fine) == 13
    assert int(fine.cost_C.min()) == 7 and int(fine.cost_C.max()) == 11  # from (200, 100)
    assert ManhattanBall(401, 10).refine(place, torch.tensor([206, 97])) is None


def test_a_wider_reach_looks_farther():
    wide, _ = propose(ManhattanBall(401, 10), place_at(200, 200, reach=1.5))
    assert len(wide) == 2 * 15**2 + 2 * 15 + 1


def test_a_given_token_of_the_unit_stays():
    found, _ = propose(ManhattanBall(63, 4), place_at(30, 30, free=(True, False)))
    assert sorted(found.ids_CL.tolist()) == [[x, 30] for x in range(26, 35)]
    found, _ = propose(Grammar([[0, 1], [0, 2], [3, 1]]), place_at(0, 1, free=(False, True)))
    assert found.ids_CL.tolist() == [[0, 1], [0, 2]]
    found, _ = propose(TopKAlternatives(3), place_at(0, 1, free=(True, False)))
    assert len(found) == 3 and set(found.ids_CL[:, 1].tolist()) == {1}


def test_grammar_puts_the_current_one_first_and_refuses_other_lengths():
    found, _ = propose(Grammar([[2], [0], [1], [0]]), place_at(1))
    assert found.ids_CL.tolist() == [[1], [2], [0]] and found.cost_C.tolist() == [0, 1, 2]
    with pytest.raises(DecodeError, match=r"2 columns.*alternatives of 2"):
        propose(Grammar([[2]]), place_at(1, 1))


def test_top_k_are_the_likeliest_pairs_of_the_model():
    joint = torch.rand(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = PairModel(joint)
    found, session = propose(TopKAlternatives(6), place_at(0, 0), model)
    order = joint.flatten().argsort(descending=True)[:6]  # k = V: the beam loses nothing
    assert found.ids_CL.tolist() == [[int(i) // 6, int(i) % 6] for i in order]
    assert session.forwards == 2 and session.row_forwards == 1 + 6


def test_span_delete_proposes_nothing():
    assert propose(SpanDelete(), place_at(1))[0] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ManhattanBall(5, -1), "delta=-1"),
        (lambda: ManhattanBall(5, stride=-1), "stride=-1"),
        (lambda: ManhattanBall(0), "num_values=0"),
        (lambda: ManhattanBall(3, first_id=-1), "first_id=-1"),
        (lambda: TopKAlternatives(0), "k=0"),
        (lambda: Grammar([]), "without alternatives"),
    ],
)
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(DecodeError, match=message):
        make()


def test_candidates_are_tokens_of_the_model_and_never_its_mask():
    model = HashModel(vocab=5)  # the mask is 4
    for wrong in (Grammar([[0], [4]]), Grammar([[5]]), Grammar([[-1]]), ManhattanBall(5)):
        with pytest.raises(DecodeError, match="0 to 4 without its mask, 4"):
            Reflector(model, wrong)
    Reflector(model, ManhattanBall(4))
    Reflector(model, Grammar([[0], [3]]))
