"""Goals: the likeliest that lie apart, by exact probabilities; drafts around them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.config.reflect import ReflectConfig
from rlalign.testtime import DecodeError, GoalDrafts, SampleDrafts
from rlalign.testtime.drafts import suppress
from rlalign.testtime.session import Session, run_searches
from tests.testtime.worlds import HashModel, PairModel, RandomVerifier, blank, problem_of

JOINT = torch.rand(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3


def drafted(drafts, model, columns: int = 2, size: int = 2, **settings):
    canvas = blank(columns, model.mask_id, settings.pop("given", None))
    problem = problem_of(canvas, RandomVerifier(columns // size, 0, 1.0), size)
    session = Session(problem, model.mask_id, ReflectConfig(**settings))
    return run_searches(model, [drafts.draft(session)])[0], session


def pairs_by_probability(values) -> list[tuple[int, int]]:
    pairs = itertools.product(range(7), repeat=2)
    return sorted(pairs, key=lambda pair: -float(values[pair]))


@pytest.mark.parametrize("joint", ["chain", "independent"])
def test_goals_are_the_likeliest_pairs_under_the_joint_that_is_asked_for(joint):
    model = PairModel(JOINT)
    goals = GoalDrafts(5, min_distance=0.0, width=7, joint=joint, with_greedy=False)
    found, session = drafted(goals, model)
    marginals = JOINT.sum(1)[:, None] * JOINT.sum(0)[None]
    expected = pairs_by_probability(JOINT if joint == "chain" else marginals)[:5]
    assert [tuple(row) for row in found.ids_KT.tolist()] == expected
    assert session.forwards == (2 if joint == "chain" else 1)  # nothing is left to be filled
    share = JOINT / JOINT.sum()
    if joint == "chain":
        expected_logp = [math.log(float(share[pair])) for pair in expected]
        assert found.logp_K.tolist() == pytest.approx(expected_logp, abs=1e-5)


def test_one_goal_is_the_likeliest_and_no_distance_gives_the_top():
    model = PairModel(JOINT)
    best = pairs_by_probability(JOINT)
    one, _ = drafted(GoalDrafts(1, width=7, with_greedy=False), model)
    assert [tuple(row) for row in one.ids_KT.tolist()] == best[:1]
    top, _ = drafted(GoalDrafts(9, min_distance=0.0, width=7, with_greedy=False), model)
    assert [tuple(row) for row in top.ids_KT.tolist()] == best[:9]


@settings(deadline=None)
@given(st.integers(1, 5), st.floats(0, 6), st.sampled_from([0.25, 0.3, 1.0]))
def test_accepted_goals_lie_apart_and_nothing_likelier_was_left_out(num, distance, spacing):
    found, _ = drafted(
        GoalDrafts(num, spacing=spacing, min_distance=distance, width=7, with_greedy=False),
        PairModel(JOINT),
    )
    rows = [tuple(row) for row in found.ids_KT.tolist()]
    kept: list[tuple[int, int]] = []
    for pair in pairs_by_probability(JOINT)[:40]:
        if len(kept) < num and all(
            spacing * math.dist(pair, other) >= distance - 1e-9 for other in kept
        ):
            kept.append(pair)
    assert rows == kept and len(rows) >= 1


def test_three_steps_of_0_3_metres_are_0_9_metres_apart():
    assert suppress(torch.tensor([[100], [103], [102]]).double() * 0.3, 0.9, 3).tolist() == [0, 1]


def test_drafts_around_goals_hold_them_and_cost_one_pass_of_the_canvas():
    model = HashModel(vocab=6)
    found, session = drafted(GoalDrafts(3, min_distance=0.0), model, columns=8, steps=3)
    goals = {tuple(row[6:]) for row in found.ids_KT[1:].tolist()}
    assert len(found.ids_KT) == 1 + 3 and len(goals) == 3
    assert int((found.ids_KT == model.mask_id).sum()) == 0
    assert session.forwards == 1 + 1 + 3
    assert session.row_forwards == 1 + 5 + 4 * 3  # 5 values of x are all there are


def test_the_greedy_sequence_is_a_draft_beside_the_goals():
    model = HashModel(vocab=6)
    found, _ = drafted(GoalDrafts(3), model, columns=8, steps=3)
    greedy, _ = drafted(SampleDrafts(), model, columns=8, steps=3)
    assert found.alone == greedy.alone == 0
    assert torch.equal(found.ids_KT[0], greedy.ids_KT[0])
    assert found.logp_K[0] == pytest.approx(float(greedy.logp_K[0]))
    without, _ = drafted(GoalDrafts(3, with_greedy=False), model, columns=8, steps=3)
    assert without.alone is None and torch.equal(without.ids_KT, found.ids_KT[1:])
    assert drafted(SampleDrafts(2, 1.0), model, columns=8)[0].alone is None


def test_a_given_goal_leaves_one_greedy_draft_and_half_a_one_is_completed():
    model = HashModel(vocab=6)
    whole, session = drafted(GoalDrafts(3), model, columns=8, given={6: 1, 7: 2}, steps=3)
    assert len(whole.ids_KT) == 1 and session.forwards == 3
    assert whole.ids_KT[0, 6:].tolist() == [1, 2]
    half, _ = drafted(GoalDrafts(3, min_distance=0.0), model, columns=8, given={6: 1}, steps=3)
    assert len(half.ids_KT) == 4 and set(half.ids_KT[:, 6].tolist()) == {1}


def test_samples_differ_by_index_and_seed_and_greedy_ones_do_not():
    model = HashModel(vocab=6)
    many = drafted(SampleDrafts(6, 1.0), model, columns=8, steps=2)[0].ids_KT
    assert len({tuple(row) for row in many.tolist()}) > 1
    assert torch.equal(many, drafted(SampleDrafts(6, 1.0), model, columns=8, steps=2)[0].ids_KT)
    assert torch.equal(many[:2], drafted(SampleDrafts(2, 1.0), model, columns=8, steps=2)[0].ids_KT)
    other = drafted(SampleDrafts(6, 1.0), model, columns=8, steps=2, seed=1)[0].ids_KT
    assert not torch.equal(many, other)
    greedy = drafted(SampleDrafts(2), model, columns=8, steps=2)[0].ids_KT
    assert greedy[0].tolist() == greedy[1].tolist()


def test_an_unknown_joint_is_named():
    with pytest.raises(DecodeError, match="chain or independent"):
        drafted(GoalDrafts(joint="both"), PairModel(JOINT))


def test_numbers_out_of_range_are_named():
    for wrong in ({"num": 0}, {"num": -1}, {"num_pairs": 0}, {"width": 0}):
        with pytest.raises(DecodeError, match="at least 1"):
            GoalDrafts(**wrong)
    with pytest.raises(DecodeError, match="drafts=0"):
        SampleDrafts(0)
    model = HashModel(vocab=6)
    for unit in (4, -5):
        with pytest.raises(DecodeError, match=f"unit={unit}: choose a goal unit of -4 to 3"):
            drafted(GoalDrafts(unit=unit), model, columns=8)
    assert len(drafted(GoalDrafts(unit=-4), model, columns=8)[0].ids_KT) > 1
