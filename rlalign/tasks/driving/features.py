"""What a planner sees of a scene: numbers of order 1 about the road and the users as they are now.

Legend: B scenes, 16 points of the route ahead, 5 nearest users.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from rlalign.tasks.driving.geometry import arc_lengths, headings
from rlalign.tasks.driving.scenes import Scene

NUM_POINTS, POINT_SPACING_M = 16, 4.0
NUM_USERS = 5
FEATURE_SIZES = {"ego": (1, 5), "route": (NUM_POINTS, 4), "users": (NUM_USERS, 7)}


def scene_features(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Float32 features, which hold nothing of the future:

    ego [B, 1, 5]: speed / 10, a lane to the left, to the right, commanded left, right;
    route [B, 16, 4]: x / 20, y / 10, cos, sin of the centreline every 4 m ahead;
    users [B, 5, 7]: x / 20, y / 10, cos, sin, speed / 10, 1, static; zeros where there are fewer.
    """
    parts = {"ego": _ego, "route": _route, "users": _users}
    stacked = {name: np.stack([part(scene) for scene in scenes]) for name, part in parts.items()}
    return {name: torch.from_numpy(value).float() for name, value in stacked.items()}


def _ego(scene: Scene) -> ndarray:
    others = [lane for i, lane in enumerate(scene.lanes) if i != scene.route]
    sides = [lane.points_P2[np.argmin((lane.points_P2**2).sum(-1)), 1] for lane in others]
    lanes = (any(y > 0 for y in sides), any(y < 0 for y in sides))
    return np.array([[scene.speed / 10, *lanes, scene.command == "left", scene.command == "right"]])


def _route(scene: Scene) -> ndarray:
    points_P2 = scene.centreline_P2
    along_P, heading_P = arc_lengths(points_P2), headings(points_P2)
    here = along_P[np.argmin((points_P2**2).sum(-1))]
    at = here + POINT_SPACING_M * np.arange(1, NUM_POINTS + 1)
    columns = (points_P2[:, 0], points_P2[:, 1], heading_P)
    x, y, heading = (np.interp(at, along_P, column) for column in columns)
    return np.stack([x / 20, y / 10, np.cos(heading), np.sin(heading)], -1)


def _users(scene: Scene) -> ndarray:
    rows = np.zeros(FEATURE_SIZES["users"])
    nearest = sorted(scene.users, key=lambda user: float(np.hypot(*user.pose_T3[0, :2])))
    for row, user in zip(rows, nearest, strict=False):  # those further away than five are not seen
        x, y, heading = user.pose_T3[0]
        shape = (x / 20, y / 10, np.cos(heading), np.sin(heading), user.speed_T[0] / 10)
        row[:] = *shape, 1, user.kind == "static"
    return rows
