"""Verdicts on token plans: the scores, the unsafe waypoints, and plans that have no score."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from rlalign.tasks.driving import Codebook, DrivingVerifier, Scorer, make_scene, track
from rlalign.tasks.driving.verifier import PlanVerifier
from rlalign.tasks.errors import TaskError
from rlalign.tasks.verifier import Verifier
from tests.tasks.driving.by_hand import END, road_user, straight_scene

BOOK = Codebook()
STRAIGHT = np.stack([4.0 * np.arange(1, 9), np.zeros(8)], -1)


def test_a_verdict_is_the_scorer_s():
    scene = make_scene(11)
    rng = np.random.default_rng(0)
    plans = scene.expert_N2 + rng.normal(size=(20, 1, 2)) * [6, 2] * np.arange(1, 9)[:, None] / 8
    ids = BOOK.encode(plans)
    verifier: Verifier = DrivingVerifier(scene, BOOK, "gt")
    verdict = verifier.judge(ids)
    scores = Scorer(scene, "gt").score(track(BOOK.decode(ids), scene.speed))
    assert np.array_equal(verdict.score_B, scores.pdms_K)
    assert np.array_equal(verdict.hard_B, scores.hard_K)
    assert np.array_equal(verdict.safe_BU, scores.safe())
    assert verdict.safe_BU.shape == (20, verifier.num_units) and verdict.num_invalid == 0
    assert 0 < float(verdict.hard_B.mean()) < 1
    alone = [float(verifier.judge(row[None]).score_B) for row in ids]
    assert alone == verdict.score_B.tolist()


def test_the_earliest_unsafe_waypoint_is_the_one_that_collides():
    """The car stands at 24 m: its back is reached at 18.3 m, after 2.3 s, by the fifth waypoint;
    by the eighth the plan has gone through it."""
    scene = straight_scene([road_user(24)], progress_m=END)
    verdict = DrivingVerifier(scene, BOOK).judge(BOOK.encode(STRAIGHT[None]))
    assert verdict.safe_BU[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 1]
    assert float(verdict.score_B) == float(verdict.hard_B) == 0


def test_near_collisions_count_when_asked_for():
    scene = straight_scene([road_user(END + 3.7 + 2 + 2)], progress_m=END)
    ids = BOOK.encode(STRAIGHT[None])
    plain = DrivingVerifier(scene, BOOK).judge(ids)
    strict = DrivingVerifier(scene, BOOK, with_ttc=True).judge(ids)
    assert plain.safe_BU.min() == 1 and strict.safe_BU.min() == 0.5
    assert float(plain.score_B) == float(strict.score_B) == pytest.approx(7 / 12)


def test_the_oracle_decides():
    leader = road_user(18, vx=8)
    leader.pose_T3[:, 0] = 18 + 8 * np.minimum(0.1 * np.arange(51), 1)
    leader.speed_T[10:] = 0
    scene, ids = straight_scene([leader], progress_m=END), BOOK.encode(STRAIGHT[None])
    hard = [float(DrivingVerifier(scene, BOOK, o).judge(ids).hard_B) for o in ("cv", "gt")]
    assert hard == [1, 0]


def test_a_score_that_is_no_number_counts_as_nothing_and_is_counted(caplog):
    scene = straight_scene(progress_m=END)
    scorer = Scorer(scene)

    def faulty(states):
        states = states.copy()
        states[1] = np.nan
        return scorer.score(states)

    verifier = PlanVerifier(faulty, scene.speed, BOOK)
    with caplog.at_level(logging.WARNING):
        verdict = verifier.judge(BOOK.encode(np.stack([STRAIGHT] * 3)))
    assert verdict.num_invalid == 1 and "1 of 3" in caplog.text
    assert verdict.score_B.tolist() == pytest.approx([1, 0, 1])
    assert verdict.hard_B.tolist() == [1, 0, 1] and verdict.safe_BU.min(1).values[1] == 0


def test_an_unfinished_plan_is_refused():
    ids = torch.full((1, 16), BOOK.size)
    with pytest.raises(TaskError, match="filled"):
        DrivingVerifier(straight_scene(), BOOK).judge(ids)
