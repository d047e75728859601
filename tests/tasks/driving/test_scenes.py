"""Scenes: their JSON, what the oracles say of the future, and what is no scene."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.tasks.driving import Scene, Scorer, make_scene
from rlalign.tasks.errors import TaskError
from tests.tasks.driving.by_hand import random_plans, road_user, straight_scene

TEXT = make_scene(2).to_json()


def test_json_keeps_every_digit():
    for seed in range(5):
        scene = make_scene(seed)
        again = Scene.from_json(scene.to_json())
        assert again.to_json() == scene.to_json()
        plans = random_plans(scene, 5, seed)
        for name, value in dataclasses.asdict(Scorer(scene).score(plans)).items():
            assert np.array_equal(value, getattr(Scorer(again).score(plans), name))
    by_hand = straight_scene()  # without users or an expert
    assert Scene.from_json(by_hand.to_json()).expert_N2 is None


def broken(change) -> str:
    raw = json.loads(TEXT)
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        TEXT[:-5],
        broken(lambda raw: raw["users"][0].update(kind="tank")),
        broken(lambda raw: raw["users"][0]["pose_T3"].pop()),
        broken(lambda raw: raw["users"][0]["speed_T"].pop()),
        broken(lambda raw: raw["users"][0].update(colour="red")),
        broken(lambda raw: raw.update(speed=-1)),
        broken(lambda raw: raw.update(speed="fast")),
        broken(lambda raw: raw.update(command="up")),
        broken(lambda raw: raw.update(route=7)),
        broken(lambda raw: raw["expert_N2"].pop()),
        broken(lambda raw: raw["drivable_P2"][0].append(1.0)),
        broken(lambda raw: raw["drivable_P2"][0].__setitem__(0, None)),
        broken(lambda raw: raw["lanes"][0].update(points_P2=[[0.0, 0.0]])),
        broken(lambda raw: raw.update(lanes=[])),
    ],
)
def test_what_is_no_scene_is_refused(text):
    with pytest.raises(TaskError, match=r"Scene\.to_json"):
        Scene.from_json(text)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *((lambda raw, v=v: raw.update(speed=v), "speed") for v in (True, NAN, INF, -0.1, 10**400)),
        *((lambda raw, v=v: raw.update(progress_m=v), "progress_m") for v in (-1, None, NAN, "1")),
        *((lambda raw, v=v: raw.update(route=v), "route") for v in (True, 0.0, -1)),
        *((lambda raw, v=v: raw.update(seed=v), "seed") for v in (True, 0.5, None)),
        *(
            (lambda raw, v=v: raw["lanes"][0].update(width_m=v), "width_m of a lane")
            for v in (0, INF, True)
        ),
        *(
            (lambda raw, v=v: raw["users"][0].update(width_m=v), "width_m of a user")
            for v in (0, -1, False)
        ),
        (lambda raw: raw["users"][0].update(length_m=NAN), "length_m of a user"),
        *(
            (lambda raw, v=v: raw["lanes"][0]["points_P2"][0].__setitem__(1, v), "coordinate")
            for v in (True, "1.0", INF, NAN)
        ),
        (
            lambda raw: raw["lanes"][0].update(points_P2=[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]),
            "points_P2 of a lane",
        ),
    ],
)
def test_a_wrong_number_is_named_by_its_field(change, field):
    with pytest.raises(TaskError, match=field):
        Scene.from_json(broken(change))


def test_json_that_python_cannot_read_is_refused():
    for text in ("[" * 100_000, '{"seed": ' + "1" * 5000 + "}"):
        with pytest.raises(TaskError, match="driving scene"):
            Scene.from_json(text)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(set(json.loads(TEXT)) - {"progress_m"})))
def test_no_field_may_be_missing(name):
    with pytest.raises(TaskError):
        Scene.from_json(broken(lambda raw: raw.pop(name)))


def test_constant_velocity_is_exact_for_who_keeps_it_and_wrong_for_who_brakes():
    steady = road_user(5, 1, vx=3, vy=4)
    braking = road_user(20, vx=6)
    braking.pose_T3[:, 0] = 20 + 6 * np.minimum(0.1 * np.arange(51), 2)
    braking.speed_T[20:] = 0
    scene = straight_scene([steady, braking])
    (gt_pose, gt_speed), (cv_pose, cv_speed) = scene.futures("gt"), scene.futures("cv")
    assert np.allclose(gt_pose[0], cv_pose[0]) and np.allclose(gt_speed[0], cv_speed[0])
    assert np.allclose(cv_pose[1, :, 0], 20 + 0.6 * np.arange(51)) and (cv_speed[1] == 6).all()
    assert gt_pose[1, 50, 0] == 32


def test_an_oracle_of_one_s_own():
    scene = straight_scene([road_user(9)])
    pose, speed = scene.futures("gt")
    predicted = scene.futures(lambda s: (pose + 1, speed))
    assert np.array_equal(predicted[0], pose + 1)
    with pytest.raises(TaskError, match="oracle predicts"):
        scene.futures(lambda s: (pose[:, :40], speed))
    with pytest.raises(TaskError, match="'gt' nor 'cv'"):
        scene.futures("best")
    assert [part.shape for part in straight_scene().futures("cv")] == [(0, 51, 3), (0, 51)]
