"""A scene of ToyDrive: a road, its users with their futures, and where the ego vehicle is going.

Everything is in the ego frame of the first instant: the rear axle at the origin, x forward, y to
the left; metres, seconds, radians. Scenes are made by `world.make_scene`, or by hand, and travel as
JSON.

Legend: T instants 0.1 s apart from 0 s on (51 of a user, 5 s), N = 8 waypoints 0.5 s apart from
0.5 s on, P points of a polyline, U road users.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from rlalign.tasks.errors import TaskError

DT_S = 0.1
NUM_INSTANTS = 41  # of a plan: 4 s
NUM_USER_INSTANTS = 51  # of a road user: what a plan may run into within a second of its end
NUM_WAYPOINTS = 8
INSTANTS_PER_WAYPOINT = 5
EGO_LENGTH_M, EGO_WIDTH_M = 4.8, 2.0
EGO_CENTRE_M = EGO_LENGTH_M / 2 - 1.1  # the box centre, ahead of the rear axle
COMMANDS = ("left", "straight", "right")
KINDS = ("vehicle", "bicycle", "pedestrian", "static")

Futures = tuple[ndarray, ndarray]  # poses [U, T, 3] and speeds [U, T] of all users
Oracle = str | Callable[["Scene"], Futures]  # "gt", "cv", or a prediction of the caller's


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """Its centre, a polyline [P, 2], and its width."""

    points_P2: ndarray
    width_m: float


@dataclass(frozen=True, slots=True, eq=False)
class RoadUser:
    """A box of one of `KINDS` and what it will really do: `pose_T3` of its centre, `speed_T`."""

    kind: str
    length_m: float
    width_m: float
    pose_T3: ndarray
    speed_T: ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """One planning problem. The ego vehicle drives `speed` m/s on lane number `route`.

    `drivable_P2` is the outline of the drivable area. `expert_N2` is what a planner that knows the
    future would do and `progress_m` how far that comes along the route, the bound of the progress
    score (0: none is known, and the score is 1).
    """

    seed: int
    command: str
    speed: float
    lanes: tuple[Lane, ...]
    route: int
    drivable_P2: ndarray
    users: tuple[RoadUser, ...]
    expert_N2: ndarray | None = None
    progress_m: float = 0.0

    @property
    def centreline_P2(self) -> ndarray:
        return self.lanes[self.route].points_P2

    def futures(self, oracle: Oracle = "gt") -> Futures:
        """What the users will do: really ("gt"), at constant velocity ("cv"), or as a callable
        says. Raises TaskError for another name or a prediction of the wrong shape."""
        num = len(self.users)
        if callable(oracle):
            pose_UT3, speed_UT = (np.asarray(part, dtype=float) for part in oracle(self))
            wanted = (num, NUM_USER_INSTANTS)
            if pose_UT3.shape != (*wanted, 3) or speed_UT.shape != wanted:
                raise TaskError(
                    f"the oracle predicts arrays of {pose_UT3.shape} and {speed_UT.shape}; it must "
                    f"return poses of {(*wanted, 3)} and speeds of {wanted}"
                )
            return pose_UT3, speed_UT
        if oracle not in ("gt", "cv"):
            raise TaskError(f"oracle={oracle!r} is neither 'gt' nor 'cv' nor a function of a scene")
        pose_UT3 = np.array([user.pose_T3 for user in self.users]).reshape(
            num, NUM_USER_INSTANTS, 3
        )
        speed_UT = np.array([user.speed_T for user in self.users]).reshape(num, NUM_USER_INSTANTS)
        return (pose_UT3, speed_UT) if oracle == "gt" else _constant_velocity(pose_UT3, speed_UT)

    def to_json(self) -> str:
        """All of the scene; floats to the last digit."""
        return json.dumps(dataclasses.asdict(self), default=lambda array: array.tolist())

    @staticmethod
    def from_json(text: str) -> Scene:
        """Raises TaskError for what is not a scene, with the field that is wrong."""
        try:
            raw = json.loads(text)
            lanes = tuple(Lane(_array(lane.pop("points_P2")), **lane) for lane in raw.pop("lanes"))
            users = tuple(_user(user) for user in raw.pop("users"))
            expert = raw.pop("expert_N2")
            expert_N2 = None if expert is None else _array(expert)
            drivable_P2 = _array(raw.pop("drivable_P2"))
            scene = Scene(
                lanes=lanes, users=users, expert_N2=expert_N2, drivable_P2=drivable_P2, **raw
            )
            _check(scene)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TaskError(
                f"this is not the JSON of a driving scene ({error}): write it with Scene.to_json"
            ) from error
        return scene


def _constant_velocity(pose_UT3: ndarray, speed_UT: ndarray) -> Futures:
    start_U13, speed_U1 = pose_UT3[:, :1], speed_UT[:, :1]
    distance_UT = speed_U1 * DT_S * np.arange(NUM_USER_INSTANTS)
    heading_UT = np.broadcast_to(start_U13[..., 2], distance_UT.shape)
    x_UT = start_U13[..., 0] + distance_UT * np.cos(heading_UT)
    y_UT = start_U13[..., 1] + distance_UT * np.sin(heading_UT)
    return np.stack([x_UT, y_UT, heading_UT], -1), np.broadcast_to(speed_U1, distance_UT.shape)


def _user(raw: dict[str, Any]) -> RoadUser:
    return RoadUser(pose_T3=_array(raw.pop("pose_T3")), speed_T=_array(raw.pop("speed_T")), **raw)


def _array(raw: Any) -> ndarray:
    if not all(_is_number(value) for value in np.array(raw, dtype=object).flat):
        raise ValueError("a coordinate is not a finite number")
    return np.array(raw, dtype=float)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _check(scene: Scene) -> None:
    """Raises ValueError for what would fail later, far from here."""
    _check_numbers(scene)
    polylines = [scene.drivable_P2, *(lane.points_P2 for lane in scene.lanes)]
    shapes = {
        "a polyline is not [P, 2]": all(p.ndim == 2 and p.shape[1] == 2 for p in polylines),
        "a polyline has fewer than 2 points": min(map(len, polylines)) >= 2,
        "a user's poses are not [51, 3]": all(
            user.pose_T3.shape == (NUM_USER_INSTANTS, 3) for user in scene.users
        ),
        "a user's speeds are not [51]": all(
            user.speed_T.shape == (NUM_USER_INSTANTS,) for user in scene.users
        ),
        f"a user's kind is none of {KINDS}": all(user.kind in KINDS for user in scene.users),
        f"the command is none of {COMMANDS}": scene.command in COMMANDS,
        "the route is not the number of a lane": scene.route in range(len(scene.lanes)),
        "the expert's plan is not [8, 2]": scene.expert_N2 is None
        or scene.expert_N2.shape == (NUM_WAYPOINTS, 2),
        "points_P2 of a lane has two equal neighbours": all(
            np.diff(lane.points_P2, axis=0).any(-1).all() for lane in scene.lanes
        ),
    }
    for problem, fine in shapes.items():
        if not fine:
            raise ValueError(problem)


def _check_numbers(scene: Scene) -> None:
    """Raises ValueError for the first number that is none, or out of its range."""
    if type(scene.seed) is not int:
        raise ValueError(f"seed={scene.seed!r} is not a whole number")
    if type(scene.route) is not int:
        raise ValueError(f"route={scene.route!r} is not a whole number")
    sizes = [("width_m of a lane", lane.width_m) for lane in scene.lanes]
    for user in scene.users:
        sizes += [("length_m of a user", user.length_m), ("width_m of a user", user.width_m)]
    for name, value in sizes:
        if not (_is_number(value) and value > 0):
            raise ValueError(f"{name} is {value!r}, not a finite number above 0")
    for name, value in (("speed", scene.speed), ("progress_m", scene.progress_m)):
        if not (_is_number(value) and value >= 0):
            raise ValueError(f"{name}={value!r} is not a finite number of at least 0")
