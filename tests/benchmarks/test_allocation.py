"""What the benchmarks of allocation and offline training make of curves, questions and samples."""

import math
import sys
from pathlib import Path

import pytest

from rlalign import bench

sys.path.insert(0, str(Path(bench.FOLDER)))
import allocation
import offline
from _mixed import crossings


def test_the_goal_is_reached_between_two_evaluations():
    curve = {"tokens": [0, 100, 200, 300], "accuracy": [0.4, 0.5, 0.45, 0.7]}
    assert allocation.first_at(curve, "tokens", 0.6) == pytest.approx(260)
    assert allocation.first_at(curve, "tokens", 0.45) == pytest.approx(50)
    assert allocation.first_at(curve, "tokens", 0.8) == math.inf


def test_a_share_is_of_the_uniform_run_of_the_same_seed():
    base = {"side": "RAFT, 8 each", "all tokens": 300}
    mine = {"side": "GVM-RAFT, pilot 4 + 4", "all tokens": 300}
    axes = {"tokens": [0, 300], "seconds": [0, 10]}
    curves = [
        {**base, "seed": 0, **axes, "accuracy": [0.4, 0.6]},
        {**base, "seed": 1, **axes, "accuracy": [0.4, 0.8]},
        {**mine, "seed": 0, **axes, "accuracy": [0.4, 0.8]},
        {**mine, "seed": 1, **axes, "accuracy": [0.4, 0.6]},
    ]
    found = allocation.summary("GVM-RAFT, pilot 4 + 4", curves)
    assert found["tokens to uniform's end, share"] == math.inf  # of 0.5 and never
    found = allocation.summary("GVM-RAFT, pilot 4 + 4", [c for c in curves if c["seed"] == 0])
    assert found["tokens to uniform's end, share"] == pytest.approx(0.5)
    assert found["seconds to uniform's end, share"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("84-9+8=?", 2), ("12+3+4=?", 0), ("19+1=?", 1), ("20-1=?", 1), ("5+5-5=?", 2)],
)
def test_steps_that_cross_a_ten(prompt, count):
    assert crossings(prompt) == count


def test_pairs_are_disjoint_and_of_whole_completions():
    row = {
        "prompt": "1+1=?",
        "completions": ["a", "b", "b", "c", "d", "e"],
        "scores": [1, 1, 1, 0, 0, 0],
        "truncated": [False, False, False, False, False, True],
    }
    pairs = offline.make_pairs([row, {**row, "scores": [1] * 6}], seed=0)
    assert len(pairs) == 2
    assert {p["chosen"] for p in pairs} == {"a", "b"}
    assert {p["rejected"] for p in pairs} == {"c", "d"}
