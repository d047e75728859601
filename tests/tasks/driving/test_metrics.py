"""The measures beside the score, on plans whose distances are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlalign.tasks.driving import expert_distance, lane_distance, make_scene, track
from rlalign.tasks.errors import TaskError
from tests.tasks.driving.by_hand import straight_plan, straight_scene


def test_distance_to_the_expert():
    expert = np.stack([4.0 * np.arange(1, 9), np.full(8, 3.0)], -1)
    scene = replace(straight_scene(), expert_N2=expert)
    plans = np.concatenate([straight_plan(), straight_plan(y=3), straight_plan(y=-1)])
    assert np.allclose(expert_distance(plans, scene), [3, 0, 4])
    with pytest.raises(TaskError, match="no expert"):
        expert_distance(plans, straight_scene())


def test_the_expert_is_near_itself():
    for seed in range(10):
        scene = make_scene(seed)
        plans = track(
            np.stack([scene.expert_N2, scene.expert_N2 + np.array([3.0, 0])]), scene.speed
        )
        near, far = expert_distance(plans, scene)
        assert near < 0.15 and 2.5 < far < 3.1


def test_distance_from_the_middle_of_the_lane():
    plans = np.concatenate([straight_plan(), straight_plan(y=-2), straight_plan(heading=0.1)])
    middle = np.mean(0.8 * np.arange(41)) * np.sin(0.1)
    assert np.allclose(lane_distance(plans, straight_scene()), [0, 2, middle])
