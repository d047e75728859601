"""Measures that the score does not contain, so that a search cannot have optimised them.

Legend: K plans, N = 8 waypoints, T = 41 instants.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from rlalign.tasks.driving.geometry import project
from rlalign.tasks.driving.scenes import INSTANTS_PER_WAYPOINT, Scene
from rlalign.tasks.errors import TaskError


def expert_distance(states_KT3: ndarray, scene: Scene) -> ndarray:
    """Mean distance in metres to the expert's waypoints: [K]. TaskError for a scene without one."""
    if scene.expert_N2 is None:
        raise TaskError(f"scene {scene.seed} has no expert plan: add one with with_expert")
    waypoints_KN2 = states_KT3[:, INSTANTS_PER_WAYPOINT::INSTANTS_PER_WAYPOINT, :2]
    apart_KN2 = waypoints_KN2 - scene.expert_N2
    return np.hypot(apart_KN2[..., 0], apart_KN2[..., 1]).mean(1)


def lane_distance(states_KT3: ndarray, scene: Scene) -> ndarray:
    """Mean distance in metres of the rear axle from the centre of the route's lane: [K]."""
    points_M2 = states_KT3[..., :2].reshape(-1, 2)
    return project(points_M2, scene.centreline_P2)[1].reshape(states_KT3.shape[:2]).mean(1)
