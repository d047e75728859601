"""The contract with a scorer process: order, shapes, deadlines, one restart, one metric."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlalign.tasks.driving import Codebook
from rlalign.tasks.driving.navsim import NavsimError, NavsimScorer
from rlalign.tasks.driving.verifier import PlanVerifier
from tests.tasks.driving.by_hand import straight_plan

FAKE = Path(__file__).with_name("fake_navsim.py")
PLANS = np.concatenate([straight_plan(speed) for speed in (5.0, 10.0, 2.5)])


def scorer(behaviour: str, folder: Path, timeout_s: float = 20.0, **settings) -> NavsimScorer:
    command = [sys.executable, str(FAKE)]
    return NavsimScorer(command, [behaviour, str(folder)], timeout_s=timeout_s, **settings)


def starts(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "starts").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_scores_come_back_in_the_order_asked(tmp_path):
    with scorer("works", tmp_path) as navsim:
        scores = navsim.score("scene-1", PLANS, oracle="cv")
        assert scores.pdms_K.tolist() == pytest.approx([0.2, 0.4, 0.1])
        assert scores.hard_K.tolist() == [1, 1, 1] and scores.nc_KT.shape == (3, 41)
        assert navsim.score("scene-2", PLANS[::-1]).pdms_K.tolist() == pytest.approx(
            [0.1, 0.4, 0.2]
        )
        assert navsim.num_restarts == 0
    first, second = map(json.loads, (tmp_path / "requests.jsonl").read_text().splitlines())
    assert (first["token"], first["oracle"], first["interval_s"]) == ("scene-1", "cv", 0.5)
    assert np.array_equal(first["poses"], PLANS[:, 5::5]) and second["oracle"] == "gt"
    (pid,) = starts(tmp_path)  # one process for all
    assert not is_alive(pid)


def test_it_is_a_scorer_like_the_toy_s(tmp_path):
    with scorer("works", tmp_path) as navsim:
        book = Codebook()
        verifier = PlanVerifier(lambda states: navsim.score("scene", states, "cv"), 5.0, book)
        waypoints = np.stack([2.5 * np.arange(1, 9), np.zeros(8)], -1)
        verdict = verifier.judge(book.encode(waypoints[None]))
    assert float(verdict.score_B) == pytest.approx(0.2) and verdict.safe_BU.shape == (1, 8)


@pytest.mark.parametrize("behaviour", ["dies once", "hangs once"])
def test_one_that_is_lost_is_replaced_once(tmp_path, behaviour):
    with scorer(behaviour, tmp_path, timeout_s=3.0) as navsim:
        assert navsim.score("scene", PLANS).pdms_K.tolist() == pytest.approx([0.2, 0.4, 0.1])
        assert navsim.num_restarts == 1
        navsim.score("scene", PLANS)
        first, second = starts(tmp_path)
        assert not is_alive(first) and is_alive(second)


def test_one_that_keeps_dying_is_given_up_with_its_last_words(tmp_path):
    with (
        scorer("dies", tmp_path) as navsim,
        pytest.raises(NavsimError, match=r"(?s)segmentation fault, say.*twice in a row"),
    ):
        navsim.score("scene", PLANS)
    assert len(starts(tmp_path)) == 2


def test_one_that_hangs_costs_two_deadlines_and_no_more(tmp_path):
    began = time.monotonic()
    with (
        scorer("hangs", tmp_path, timeout_s=1.0) as navsim,
        pytest.raises(NavsimError, match="did not answer within 1 s"),
    ):
        navsim.score("scene", PLANS)
    assert 2 <= time.monotonic() - began < 20
    assert not any(map(is_alive, starts(tmp_path)))


def test_another_metric_is_refused(tmp_path):
    with (
        scorer("another metric", tmp_path) as navsim,
        pytest.raises(NavsimError, match=r"'epdms-v2', not 'pdms-v1\.1'"),
    ):
        navsim.score("scene", PLANS)
    assert not (tmp_path / "requests.jsonl").exists()  # nothing was asked of it
    with scorer("another metric", tmp_path, metric="epdms-v2") as navsim:
        navsim.score("scene", PLANS)


def test_a_failure_of_the_devkit_is_an_error_of_that_request_alone(tmp_path):
    with scorer("fails", tmp_path) as navsim:
        for token in ("lost", "gone"):
            with pytest.raises(NavsimError, match=f"KeyError: '{token}'"):
                navsim.score(token, PLANS)
    assert len(starts(tmp_path)) == 1


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("too few", r"'pdms' is \(2,\)"), ("per cent", r"40\.0"), ("forgets", "'ttc_steps'")],
)
def test_an_answer_of_another_shape_is_refused(tmp_path, behaviour, message):
    with scorer(behaviour, tmp_path) as navsim, pytest.raises(NavsimError, match=message):
        navsim.score("scene", PLANS)


def test_one_that_cannot_start(tmp_path):
    with (
        scorer("does not start", tmp_path) as navsim,
        pytest.raises(NavsimError, match=r"(?s)devkit installed there.*No module named 'navsim'"),
    ):
        navsim.score("scene", PLANS)
    missing = NavsimScorer.of_devkit("/nowhere/bin/python", "/nowhere")
    with pytest.raises(NavsimError, match="cannot be started"):
        missing.score("scene", PLANS)


def test_what_it_cannot_be_asked(tmp_path):
    navsim = scorer("works", tmp_path)
    with pytest.raises(NavsimError, match="oracle"):
        navsim.score("scene", PLANS, oracle="learned")
    with pytest.raises(NavsimError, match="finite"):
        navsim.score("scene", np.where(PLANS > 30, np.nan, PLANS))
    assert not (tmp_path / "starts").exists()  # no process for that
