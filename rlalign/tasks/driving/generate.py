"""Roads and traffic, drawn at random: what a planner has to cope with.

A road is one lane that goes straight (30 %), turns left or right by 90 degrees (20 % each) or
bends gently (30 %), perhaps with a neighbour lane on either side, and 0.6 m of shoulder. Traffic: a
leader that may brake, cars on the neighbour lanes, and a car parked half in the way.

Legend: P points of a polyline 1 m apart, T = 51 instants.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from rlalign.tasks.driving.geometry import arc_lengths, headings, overlap, shifted
from rlalign.tasks.driving.scenes import (
    DT_S,
    EGO_CENTRE_M,
    EGO_LENGTH_M,
    EGO_WIDTH_M,
    NUM_USER_INSTANTS,
    Lane,
    RoadUser,
    Scene,
)

LANE_M, SHOULDER_M = 3.5, 0.6
BEHIND_M, AHEAD_M, SPACING_M = 30.0, 120.0, 1.0
ROADS = ("straight", "left", "right", "bend")
ROAD_SHARE = (0.3, 0.2, 0.2, 0.3)
MAX_BEND = 1 / 45  # 1/m
CAR_LENGTH_M, CAR_WIDTH_M = 4.5, 1.9
CLEARANCE_M = 0.2  # by which a leader passes a parked car


def draw_scene(seed: int, attempt: int = 0) -> Scene | None:
    """The road and its users, without an expert; None where users overlap at the first instant."""
    rng = np.random.default_rng((seed, attempt))
    shape = str(rng.choice(ROADS, p=ROAD_SHARE))
    turns = shape in ("left", "right")
    speed = float(rng.uniform(2, 11 if turns else 14))
    points_P2, heading_P = _path(rng, shape)
    has_left, has_right = (bool(side) for side in rng.random(2) < 0.5)
    offsets = [0.0] + [LANE_M] * has_left + [-LANE_M] * has_right
    lanes = tuple(Lane(shifted(points_P2, heading_P, offset), LANE_M) for offset in offsets)
    edge_m = LANE_M / 2 + SHOULDER_M
    left_P2 = shifted(points_P2, heading_P, edge_m + LANE_M * has_left)
    right_P2 = shifted(points_P2, heading_P, -edge_m - LANE_M * has_right)
    drivable_P2 = np.concatenate([right_P2, left_P2[::-1]])
    users = _traffic(rng, speed, lanes, offsets)
    command = shape if turns else "straight"
    return None if _crowded(users) else Scene(seed, command, speed, lanes, 0, drivable_P2, users)


def _path(rng: np.random.Generator, shape: str) -> tuple[ndarray, ndarray]:
    """The ego lane's centre, through the origin along x, and its headings: curvature summed up."""
    at_P = np.arange(-BEHIND_M, AHEAD_M, SPACING_M)
    radius, start = rng.uniform(10, 20), rng.uniform(6, 18)
    curvature_P = np.zeros_like(at_P)
    if shape == "bend":
        curvature_P[:] = rng.uniform(-MAX_BEND, MAX_BEND)
    elif shape != "straight":
        # The share of each metre that lies in the turn: it is 90 degrees wherever it starts.
        end = start + radius * np.pi / 2
        overlap_P = np.minimum(at_P + SPACING_M, end) - np.maximum(at_P, start)
        share_P = np.clip(overlap_P / SPACING_M, 0, 1)
        curvature_P = share_P * (1 if shape == "left" else -1) / radius
    origin = int(np.searchsorted(at_P, 0.0))
    heading_P = np.concatenate([[0.0], np.cumsum(curvature_P * SPACING_M)[:-1]])
    heading_P -= heading_P[origin]
    along_P = heading_P + curvature_P * SPACING_M / 2
    steps_P2 = SPACING_M * np.stack([np.cos(along_P), np.sin(along_P)], -1)
    points_P2 = np.concatenate([np.zeros((1, 2)), np.cumsum(steps_P2, axis=0)[:-1]])
    return points_P2 - points_P2[origin], heading_P


def _traffic(
    rng: np.random.Generator, speed: float, lanes: tuple[Lane, ...], offsets: list[float]
) -> tuple[RoadUser, ...]:
    (route, _), *neighbours = zip(lanes, offsets, strict=True)
    users, side, swerve = [], 0.0, 0.0
    if rng.random() < 0.45:
        side = float(rng.choice((-1.0, 1.0)))
        offset = rng.uniform(1.6, 2.2)
        users.append(_drive(route, rng.uniform(10, 45), 0.0, 0.0, side * offset, "static"))
        swerve = -side * max(CAR_WIDTH_M + CLEARANCE_M - offset, 0)
    if rng.random() < 0.6:
        start, share = rng.uniform(9, 30), rng.uniform(0, 1)
        braking = rng.choice((0.0, -2.0, -3.5), p=(0.6, 0.2, 0.2))
        users.append(_drive(route, start, share * speed, float(braking), swerve))
    for lane, offset_m in neighbours:
        if rng.random() < 0.6 and offset_m * side <= 0:  # it would drive through the parked car
            start, share = rng.uniform(-15, 25), rng.uniform(0.6, 1.2)
            users.append(_drive(lane, start, share * speed))
    return tuple(users)


def _drive(
    lane: Lane,
    start_m: float,
    speed: float,
    acceleration: float = 0.0,
    offset_m: float = 0.0,
    kind: str = "vehicle",
) -> RoadUser:
    """A car `start_m` ahead of the ego's rear axle that follows a lane, `offset_m` to its left."""
    heading_P = headings(lane.points_P2)
    line_P2 = shifted(lane.points_P2, heading_P, offset_m)
    along_P = arc_lengths(line_P2)
    nearest = int(np.argmin((line_P2**2).sum(-1)))
    seconds_T = DT_S * np.arange(NUM_USER_INSTANTS)
    speed_T = np.maximum(speed + acceleration * seconds_T, 0)
    braking_s = np.minimum(seconds_T, -speed / acceleration) if acceleration < 0 else seconds_T
    driven_T = speed * braking_s + acceleration * braking_s**2 / 2
    at_T = along_P[nearest] + start_m + driven_T
    columns = (line_P2[:, 0], line_P2[:, 1], heading_P)
    pose_T3 = np.stack([np.interp(at_T, along_P, column) for column in columns], -1)
    return RoadUser(kind, CAR_LENGTH_M, CAR_WIDTH_M, pose_T3, speed_T)


def _crowded(users: tuple[RoadUser, ...]) -> bool:
    """Whether any two boxes, the ego's included, meet at the first instant."""
    ego = (np.array([EGO_CENTRE_M, 0.0, 0.0]), EGO_LENGTH_M, EGO_WIDTH_M)
    boxes = [ego] + [(user.pose_T3[0], user.length_m, user.width_m) for user in users]
    return any(
        overlap(a[0], np.array(a[1:]) / 2, b[0], np.array(b[1:]) / 2)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )
