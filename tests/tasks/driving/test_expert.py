"""The expert is good, comfortable at the limit, and part of what a seed decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlalign.tasks.driving import Codebook, Scorer, make_scene, track, with_expert
from rlalign.tasks.driving.expert import candidates
from rlalign.tasks.driving.scenes import Scene
from tests.tasks.driving.by_hand import END, road_user, straight_scene

pytest.importorskip("shapely")

SCENES = [make_scene(seed) for seed in range(150)]
CODEBOOK = Codebook()


def mean_scores(scenes: list[Scene], quantised: bool) -> dict[str, float]:
    """In per cent, of the experts' plans as the tracker drives them."""
    rows = []
    for scene in scenes:
        plan = scene.expert_N2[None]
        plan = CODEBOOK.decode(CODEBOOK.encode(plan)) if quantised else plan
        scores = Scorer(scene).score(track(plan, scene.speed))
        rows.append([scores.nc_K[0], scores.dac_K[0], scores.ttc_K[0], scores.pdms_K[0]])
    return dict(zip(("nc", "dac", "ttc", "pdms"), 100 * np.mean(rows, axis=0), strict=True))


def test_the_expert_scores_95_and_nearly_as_much_in_tokens():
    exact, quantised = mean_scores(SCENES, False), mean_scores(SCENES, True)
    assert exact["pdms"] > 95 and exact["nc"] == exact["dac"] == 100
    assert quantised["pdms"] > 93 and exact["pdms"] - quantised["pdms"] < 3
    assert quantised["nc"] > 98 and quantised["dac"] > 97


def test_no_plan_leaves_the_codebook():
    assert sum(CODEBOOK.count_clipped(scene.expert_N2) for scene in SCENES) == 0


def test_the_plan_and_its_progress_are_those_of_a_candidate():
    for scene in SCENES[:30]:
        states = candidates(scene)
        same = np.abs(states[:, 5::5, :2] - scene.expert_N2).max((1, 2)) < 1e-12
        assert same.any()
        assert np.isclose(Scorer(scene).progress_m(states)[same], scene.progress_m).all()
        assert scene.progress_m < 4 * max(12, scene.speed) + 1


def test_candidates_start_as_the_vehicle_moves_and_brake_for_bends():
    for scene in SCENES[:40]:
        states = candidates(scene)
        assert np.abs(states[:, 0]).max() < 1e-9
        first = np.hypot(*(states[:, 1, :2] / 0.1).T)
        assert np.abs(first - scene.speed).max() < 0.1
        turning = np.abs(np.gradient(states[..., 2], 0.1, axis=1))
        speed = np.hypot(*np.moveaxis(np.gradient(states[..., :2], 0.1, axis=1), -1, 0))
        lateral = np.median(np.sort(speed * turning, axis=1)[:, -5:], axis=1)
        assert lateral[:5].max() < 4.89  # in the middle of the lane; 12 m/s would give 14


def test_a_scene_is_a_function_of_its_seed_alone():
    again = [make_scene(seed).to_json() for seed in (9, 3)]
    assert again == [SCENES[9].to_json(), SCENES[3].to_json()]
    assert len({scene.to_json() for scene in SCENES}) == len(SCENES)


def test_what_cannot_be_driven_has_no_expert():
    wall = [road_user(8, y, kind="static") for y in (-5, -3, -1, 1, 3, 5)]
    assert with_expert(straight_scene(wall, speed=10)) is None
    assert with_expert(straight_scene(speed=10)) is not None


def test_it_drives_round_a_parked_car_and_stops_behind_a_leader_that_stops():
    round_it = with_expert(straight_scene([road_user(30, 1.7, kind="static")], speed=8))
    assert round_it.expert_N2[-1, 1] == pytest.approx(-0.8) and round_it.progress_m > END - 2
    leader = road_user(22, vx=8)
    leader.pose_T3[:, 0] = 22 + 8 * np.minimum(0.1 * np.arange(51), 0.5)
    leader.speed_T[5:] = 0
    stops = with_expert(straight_scene([leader, replace(leader)], speed=8))
    assert stops.expert_N2[-1, 0] < 26 - 2 - 3.7
