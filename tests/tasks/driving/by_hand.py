"""Scenes and plans that are simple enough to judge in one's head: a straight road along x."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlalign.tasks.driving import Lane, RoadUser, Scene

SECONDS = 0.1 * np.arange(51)
END = 8.0 * 4  # where 8 m/s lead in 4 s


def road_user(
    x: float, y: float = 0.0, vx: float = 0.0, vy: float = 0.0, kind: str = "vehicle"
) -> RoadUser:
    """A box of 4 by 2 m that goes on as it does; it looks where it drives."""
    heading = np.arctan2(vy, vx) if vx or vy else 0.0
    pose = np.stack([x + vx * SECONDS, y + vy * SECONDS, np.full(51, heading)], -1)
    return RoadUser(kind, 4.0, 2.0, pose, np.full(51, np.hypot(vx, vy)))


def straight_scene(
    users: Sequence[RoadUser] = (), speed: float = 8.0, progress_m: float = 0.0
) -> Scene:
    """Three lanes of 4 m; the ego vehicle is in the middle one, the edges are at y = -6 and 6."""
    x = np.arange(-40.0, 121.0)
    lanes = tuple(Lane(np.stack([x, np.full_like(x, y)], -1), 4.0) for y in (0.0, 4.0, -4.0))
    drivable = np.array([[-40.0, -6.0], [120.0, -6.0], [120.0, 6.0], [-40.0, 6.0]])
    return Scene(0, "straight", speed, lanes, 0, drivable, tuple(users), progress_m=progress_m)


def straight_plan(speed: float = 8.0, y: float = 0.0, heading: float = 0.0) -> np.ndarray:
    """States [1, 41, 3] of constant speed in a direction, from (0, y)."""
    driven = speed * SECONDS[:41]
    plan = [driven * np.cos(heading), y + driven * np.sin(heading), np.full(41, heading)]
    return np.stack(plan, -1)[None]


def moved(scene: Scene, states: np.ndarray, angle: float, by: tuple[float, float]):
    """Scene and states after the same rotation about the origin and translation."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    def points(array):
        return array @ turn + np.array(by)

    def poses(array):
        return np.concatenate([points(array[..., :2]), array[..., 2:] + angle], -1)

    lanes = tuple(Lane(points(lane.points_P2), lane.width_m) for lane in scene.lanes)
    users = tuple(
        RoadUser(u.kind, u.length_m, u.width_m, poses(u.pose_T3), u.speed_T) for u in scene.users
    )
    rigid = Scene(
        scene.seed,
        scene.command,
        scene.speed,
        lanes,
        scene.route,
        points(scene.drivable_P2),
        users,
        progress_m=scene.progress_m,
    )
    return rigid, poses(states)


def random_plans(scene: Scene, num: int, seed: int) -> np.ndarray:
    """States of plans around the expert's, from good to hopeless."""
    from rlalign.tasks.driving import track

    rng = np.random.default_rng(seed)
    drift = rng.normal(size=(num, 1, 2)) * np.array([4.0, 1.5]) * np.arange(1, 9)[:, None] / 8
    return track(scene.expert_N2 + drift * rng.uniform(0, 1.5, (num, 1, 1)), scene.speed)
