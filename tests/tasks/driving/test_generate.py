"""Roads are what they say; traffic does not start in a collision, nor drive through parked cars."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.tasks.driving.generate import LANE_M, SHOULDER_M, draw_scene
from rlalign.tasks.driving.geometry import headings
from rlalign.tasks.driving.scenes import EGO_CENTRE_M

shapely = pytest.importorskip("shapely")

SCENES = [scene for seed in range(300) if (scene := draw_scene(seed)) is not None]


def test_a_scene_is_a_function_of_its_seed():
    assert draw_scene(4).to_json() == draw_scene(4).to_json()
    assert draw_scene(4).to_json() != draw_scene(5).to_json()
    assert draw_scene(4).to_json() != draw_scene(4, attempt=1).to_json()


def test_turns_are_right_angles_and_the_rest_bends_gently():
    for scene in SCENES:
        heading = headings(scene.centreline_P2)
        turned = heading[-1] - heading[0]
        if scene.command == "straight":
            assert np.abs(np.diff(heading)).max() < 1 / 44
        else:
            sign = 1 if scene.command == "left" else -1
            assert sign * turned == pytest.approx(np.pi / 2, abs=1e-9)
            assert 1 / 21 < np.abs(np.diff(heading)).max() < 1 / 9.9
        start = np.argmin((scene.centreline_P2**2).sum(-1))
        assert np.allclose(scene.centreline_P2[start], 0)


def test_the_shares_of_the_roads():
    commands = [scene.command for scene in SCENES]
    assert abs(np.mean([c == "left" for c in commands]) - 0.2) < 0.07  # 3 sigma
    assert abs(np.mean([c == "right" for c in commands]) - 0.2) < 0.07


def test_the_drivable_area_is_the_union_of_the_lanes_with_their_shoulders():
    for scene in SCENES[:40]:
        strips = [
            shapely.LineString(lane.points_P2).buffer(
                LANE_M / 2 + SHOULDER_M, cap_style="flat", join_style="mitre"
            )
            for lane in scene.lanes
        ]
        union, area = shapely.union_all(strips), shapely.Polygon(scene.drivable_P2)
        assert area.is_valid
        assert area.symmetric_difference(union).area < 0.002 * union.area


def test_nobody_overlaps_at_the_start():
    def box(x, y, heading, length, width):
        flat = shapely.box(-length / 2, -width / 2, length / 2, width / 2)
        turned = shapely.affinity.rotate(flat, heading, origin=(0, 0), use_radians=True)
        return shapely.affinity.translate(turned, x, y)

    for scene in SCENES:
        users = [box(*user.pose_T3[0], user.length_m, user.width_m) for user in scene.users]
        boxes = [box(EGO_CENTRE_M, 0, 0, 4.8, 2.0), *users]
        assert not any(a.intersects(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_users_move_as_fast_as_they_say_and_some_brake():
    braked = 0
    for scene in SCENES:
        for user in scene.users:
            steps = np.hypot(*np.diff(user.pose_T3[:, :2], axis=0).T) / 0.1
            means = (user.speed_T[1:] + user.speed_T[:-1]) / 2
            inside = np.abs(user.pose_T3[1:, 0]) < 100  # the road ends after 120 m
            assert np.abs(steps - means)[inside].max(initial=0) < 0.2
            braked += user.speed_T[-1] < user.speed_T[0] - 1
    assert braked > 20


def test_no_one_drives_through_a_parked_car():
    parked_and_passed = 0
    for scene in SCENES:
        parked = [u for u in scene.users if u.kind == "static"]
        for user in scene.users:
            if not parked or user.kind == "static":
                continue
            apart = np.hypot(*(user.pose_T3[:, :2] - parked[0].pose_T3[0, :2]).T)
            assert apart.min() > 1.9  # a car's width
            parked_and_passed += apart.min() < 6
    assert parked_and_passed > 10
