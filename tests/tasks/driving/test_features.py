"""What the planner sees: the present, in the order documented, and nothing of the future."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rlalign.tasks.driving import make_scene, scene_features
from rlalign.tasks.driving.features import FEATURE_SIZES
from tests.tasks.driving.by_hand import road_user, straight_scene


def test_a_straight_road_with_two_users():
    users = [road_user(30, 4, vx=6), road_user(10, -2, kind="static")]
    seen = scene_features([straight_scene(users, speed=8)])
    assert seen["ego"][0].tolist() == [[np.float32(0.8), 1, 1, 0, 0]]
    x_M = 4 * torch.arange(1, 17)
    expected = torch.stack([x_M / 20, 0 * x_M, 0 * x_M + 1, 0 * x_M], -1)
    assert torch.allclose(seen["route"][0], expected.float(), atol=1e-6)
    nearest = [[0.5, -0.2, 1, 0, 0, 1, 1], [1.5, 0.4, 1, 0, 0.6, 1, 0]]
    assert torch.allclose(seen["users"][0, :2], torch.tensor(nearest))
    assert not seen["users"][0, 2:].any()


def test_left_and_right():
    scenes = [make_scene(seed) for seed in range(60)]
    seen = scene_features(scenes)
    assert {name: value.shape[1:] for name, value in seen.items()} == FEATURE_SIZES
    for scene, ego, route in zip(scenes, seen["ego"][:, 0], seen["route"], strict=True):
        assert ego[3:].tolist() == [scene.command == "left", scene.command == "right"]
        sides = {round(float(lane.points_P2[30, 1]), 1) for lane in scene.lanes}
        assert ego[1:3].tolist() == [3.5 in sides, -3.5 in sides]
        if scene.command != "straight":
            assert (route[-1, 1] > 0) == (scene.command == "left")


def test_the_future_is_not_in_them():
    scene = make_scene(4)
    users = []
    for user in scene.users:
        pose, speed = user.pose_T3.copy(), user.speed_T.copy()
        pose[1:] += 3
        speed[1:] = 0
        users.append(replace(user, pose_T3=pose, speed_T=speed))
    other = replace(scene, users=tuple(users), expert_N2=None, progress_m=1.0)
    assert scene.users
    for before, after in zip(
        scene_features([scene]).values(), scene_features([other]).values(), strict=True
    ):
        assert torch.equal(before, after)


def test_the_five_nearest_of_many():
    users = [road_user(10.0 * k, 4.0) for k in range(8, 0, -1)]
    seen = scene_features([straight_scene(users)])["users"][0]
    assert torch.allclose(seen[:, 0], torch.tensor([0.5, 1, 1.5, 2, 2.5]))
