"""What a planner that knows the future would do: the best of 15 plans along the route.

Three lateral offsets by five speeds, each driven with bounded accelerations and slowly enough for
what the road bends ahead; scored with the real futures in a drivable area narrowed by 0.3 m.

Legend: V target speeds, K = 3 V candidates, T = 41 instants, P points of the centreline.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy import ndarray

from rlalign.tasks.driving.generate import draw_scene
from rlalign.tasks.driving.geometry import arc_lengths, headings
from rlalign.tasks.driving.scenes import DT_S, INSTANTS_PER_WAYPOINT, NUM_INSTANTS, Scene
from rlalign.tasks.driving.scorer import Scorer
from rlalign.tasks.driving.tracker import headings_of
from rlalign.tasks.errors import TaskError

OFFSETS_M = (0.0, 0.8, -0.8)
SPEEDS = np.array([0.0, 3.0, 6.0, 9.0, 12.0])  # m/s
MAX_LATERAL_ACCELERATION = 3.0  # m/s^2
ACCELERATION = (-3.6, 2.0)  # m/s^2
BRAKING = 2.0  # m/s^2, before a bend
JERK = 5.0  # m/s^3
RESPONSE_S = 0.6  # in which a difference of speeds would be made up
MARGIN_M = 0.3
MIN_SCORE = 0.5
MAX_ATTEMPTS = 200


def make_scene(seed: int) -> Scene:
    """The scene of a seed, with its expert: a function of the seed alone. Scenes in which no plan
    scores 0.5 are drawn again. Raises TaskError without shapely."""
    for attempt in range(MAX_ATTEMPTS):
        scene = draw_scene(seed, attempt)
        if scene is not None and (solved := with_expert(scene)) is not None:
            return solved
    raise TaskError(f"seed {seed} gives no scene that can be driven in {MAX_ATTEMPTS} attempts")


def with_expert(scene: Scene) -> Scene | None:
    """The scene with its best plan and that plan's progress; None if all score below 0.5."""
    states_KT3 = candidates(scene)
    scorer = Scorer(scene, "gt", margin_m=MARGIN_M)
    progress_K = scorer.progress_m(states_KT3)
    scores = scorer.score(states_KT3)
    bound = max(float(progress_K[scores.hard_K == 1].max(initial=0.0)), 1e-9)
    share_K = np.minimum(progress_K / bound, 1)
    value_K = scores.hard_K * (5 * share_K + 5 * scores.ttc_K + 2 * scores.comfort_K) / 12
    best = int(value_K.argmax())
    if value_K[best] < MIN_SCORE:
        return None
    waypoints_N2 = states_KT3[best, INSTANTS_PER_WAYPOINT::INSTANTS_PER_WAYPOINT, :2]
    return replace(scene, expert_N2=waypoints_N2, progress_m=float(progress_K[best]))


def candidates(scene: Scene) -> ndarray:
    """States [15, 41, 3], the offset 0 first: ties are won by staying in the middle."""
    points_P2 = scene.centreline_P2
    heading_P, along_P = headings(points_P2), arc_lengths(points_P2)
    start = along_P[int(np.argmin((points_P2**2).sum(-1)))]
    driven_VT = _drive(scene.speed, along_P - start, heading_P)
    blend_m = max(8.0, 2.5 * scene.speed)
    share_VT = np.clip(driven_VT / blend_m, 0, 1)
    share_VT = share_VT**3 * (10 - 15 * share_VT + 6 * share_VT**2)  # no jump up to acceleration
    at_KT = np.tile(driven_VT + start, (len(OFFSETS_M), 1))
    offset_KT = np.concatenate([offset * share_VT for offset in OFFSETS_M])
    columns = (points_P2[:, 0], points_P2[:, 1], heading_P)
    x_KT, y_KT, along_KT = (np.interp(at_KT, along_P, column) for column in columns)
    path_KT2 = np.stack(
        [x_KT - offset_KT * np.sin(along_KT), y_KT + offset_KT * np.cos(along_KT)], -1
    )
    return np.concatenate([path_KT2, headings_of(path_KT2)[..., None]], -1)


def _drive(speed: float, along_P: ndarray, heading_P: ndarray) -> ndarray:
    """Metres driven [V, T] towards each target speed."""
    limit_P = _speed_limit(along_P, heading_P)
    now_V, acceleration_V = np.full(len(SPEEDS), speed), np.zeros(len(SPEEDS))
    driven_VT = np.zeros((len(SPEEDS), NUM_INSTANTS))
    for t in range(1, NUM_INSTANTS):
        wanted_V = np.minimum(SPEEDS, np.interp(driven_VT[:, t - 1], along_P, limit_P))
        wanted_V = np.clip((wanted_V - now_V) / RESPONSE_S, *ACCELERATION)
        change_V = np.clip(wanted_V - acceleration_V, -JERK * DT_S, JERK * DT_S)
        acceleration_V = acceleration_V + change_V
        next_V = np.maximum(now_V + acceleration_V * DT_S, 0)
        driven_VT[:, t] = driven_VT[:, t - 1] + (now_V + next_V) / 2 * DT_S
        now_V = next_V
    return driven_VT


def _speed_limit(along_P: ndarray, heading_P: ndarray) -> ndarray:
    """At each point: slow enough for the bend there and, by braking gently, for all to come."""
    curvature_P = np.abs(np.gradient(heading_P, along_P))
    squared_P = MAX_LATERAL_ACCELERATION / np.maximum(curvature_P, 1e-3)
    # v^2 may fall by 2 b per metre: the least of v^2 + 2 b s over all that follows, less 2 b s.
    allowance_P = 2 * BRAKING * along_P
    return np.sqrt(np.minimum.accumulate((squared_P + allowance_P)[::-1])[::-1] - allowance_P)
