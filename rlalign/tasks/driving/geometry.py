"""Boxes and polylines of the driving world: overlap by separating axes, projection on a path.

A pose is (x, y, heading) in metres and radians. A box is its centre's pose and half sizes.

Legend: P points of a polyline, M points asked for; [...] any leading dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray


def corners(pose: ndarray, half_length: float, half_width: float) -> ndarray:
    """Corners [..., 4, 2] of boxes whose centres are `pose` [..., 3], counter-clockwise from the
    front left."""
    forward = np.stack([np.cos(pose[..., 2]), np.sin(pose[..., 2])], -1)
    left = np.stack([-forward[..., 1], forward[..., 0]], -1)
    length, width = half_length * forward, half_width * left
    offsets = [length + width, width - length, -length - width, length - width]
    return np.stack([pose[..., :2] + offset for offset in offsets], -2)


def overlap(pose_a: ndarray, half_a: ndarray, pose_b: ndarray, half_b: ndarray) -> ndarray:
    """Whether boxes meet, touching included: bool [...]. `pose` [..., 3], `half` [..., 2] (half
    length, half width), broadcast against each other.

    Two rectangles are apart exactly if one of their four axes separates them.
    """
    dx, dy = pose_b[..., 0] - pose_a[..., 0], pose_b[..., 1] - pose_a[..., 1]
    turn = pose_b[..., 2] - pose_a[..., 2]
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    return _within(dx, dy, pose_a[..., 2], half_a, half_b, cos, sin) & _within(
        dx, dy, pose_b[..., 2], half_b, half_a, cos, sin
    )


def _within(
    dx: ndarray,
    dy: ndarray,
    heading: ndarray,
    half: ndarray,
    other: ndarray,
    cos: ndarray,
    sin: ndarray,
) -> ndarray:
    """Neither axis of the box at `heading` separates it from the other."""
    c, s = np.cos(heading), np.sin(heading)
    along = np.abs(dx * c + dy * s) <= half[..., 0] + other[..., 0] * cos + other[..., 1] * sin
    across = np.abs(dy * c - dx * s) <= half[..., 1] + other[..., 0] * sin + other[..., 1] * cos
    return along & across


def arc_lengths(points_P2: ndarray) -> ndarray:
    """Metres from the first point of a polyline to each: [P]."""
    steps = np.hypot(*np.diff(points_P2, axis=0).T)
    return np.concatenate([[0.0], np.cumsum(steps)])


def headings(points_P2: ndarray) -> ndarray:
    """Direction of a polyline at each of its points, unwrapped: [P]."""
    return np.unwrap(np.arctan2(*np.gradient(points_P2, axis=0).T[::-1]))


def shifted(points_P2: ndarray, heading_P: ndarray, offset_m: float | ndarray) -> ndarray:
    """The polyline moved `offset_m` to its left: [P, 2]."""
    normal_P2 = np.stack([-np.sin(heading_P), np.cos(heading_P)], -1)
    return points_P2 + np.asarray(offset_m)[..., None] * normal_P2


def project(points_M2: ndarray, path_P2: ndarray) -> tuple[ndarray, ndarray]:
    """For each point, the nearest place of a polyline: metres along it [M], and metres away [M]."""
    start_P2, edge_P2 = path_P2[:-1], np.diff(path_P2, axis=0)
    squared_P = np.maximum((edge_P2**2).sum(-1), 1e-12)  # a point may come twice
    share_MP = points_M2 @ edge_P2.T - (start_P2 * edge_P2).sum(-1)
    share_MP = np.clip(share_MP / squared_P, 0, 1)
    x_MP = start_P2[:, 0] + share_MP * edge_P2[:, 0] - points_M2[:, :1]
    y_MP = start_P2[:, 1] + share_MP * edge_P2[:, 1] - points_M2[:, 1:]
    distance_MP = np.hypot(x_MP, y_MP)
    nearest_M1 = distance_MP.argmin(1)[:, None]
    along_MP = arc_lengths(path_P2)[:-1] + share_MP * np.sqrt(squared_P)
    pick = np.take_along_axis
    return pick(along_MP, nearest_M1, 1)[:, 0], pick(distance_MP, nearest_M1, 1)[:, 0]
