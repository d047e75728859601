"""From waypoints to motion: the smooth path that a vehicle would follow, and its headings.

    p = argmin  sum_n |p(5 n) - w_n|^2 + jerk sum |D3 p|^2 + acceleration sum |D2 p|^2

over 41 points 0.1 s apart, with p(0) and p(1) given by where the vehicle is and how fast it drives;
D2, D3 are second and third differences in m/s^2 and m/s^3. The minimiser is linear in the waypoints
and in the speed, so all candidates of a scene are one matrix product.

Legend: K plans, N = 8 waypoints, T = 41 instants.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from rlalign.tasks.driving.scenes import DT_S, INSTANTS_PER_WAYPOINT, NUM_INSTANTS, NUM_WAYPOINTS

MIN_SPEED = 0.4  # m/s: below it the direction of motion says nothing about the heading


@dataclass(frozen=True, slots=True)
class Tracker:
    """Weights of the smoothness terms. Near 0 it follows every waypoint, quantisation and all."""

    jerk: float = 2e-4
    acceleration: float = 1e-4


SMOOTH = Tracker()


def track(waypoints_KN2: ndarray, speed: float, tracker: Tracker = SMOOTH) -> ndarray:
    """States (x, y, heading) [K, 41, 3] of plans [K, 8, 2] of a vehicle at the origin that drives
    `speed` m/s along x."""
    from_waypoints_TN, from_start_T = _matrices(tracker)
    path_KT2 = from_waypoints_TN @ waypoints_KN2
    path_KT2[..., 0] += from_start_T * (speed * DT_S)
    return np.concatenate([path_KT2, headings_of(path_KT2)[..., None]], -1)


def headings_of(path_KT2: ndarray) -> ndarray:
    """Direction of motion [K, T], unwrapped, starting at 0; while slower than 0.4 m/s, between the
    last one and the next, or the last one where no other follows."""
    velocity_KT2 = np.gradient(path_KT2, DT_S, axis=1)
    heading_KT = np.arctan2(velocity_KT2[..., 1], velocity_KT2[..., 0])
    known_KT = np.hypot(velocity_KT2[..., 0], velocity_KT2[..., 1]) > MIN_SPEED
    heading_KT[:, 0], known_KT[:, 0] = 0.0, True
    num = path_KT2.shape[1]
    at_T = np.arange(num)
    last_KT = np.maximum.accumulate(np.where(known_KT, at_T, 0), axis=1)
    next_KT = np.minimum.accumulate(np.where(known_KT, at_T, num)[:, ::-1], axis=1)[:, ::-1]
    next_KT = np.where(next_KT == num, last_KT, next_KT)
    held_KT = np.unwrap(np.take_along_axis(heading_KT, last_KT, 1), axis=1)
    before_KT = np.take_along_axis(held_KT, last_KT, 1)
    after_KT = np.take_along_axis(held_KT, next_KT, 1)
    share_KT = (at_T - last_KT) / np.maximum(next_KT - last_KT, 1)
    return before_KT + share_KT * (after_KT - before_KT)


@functools.cache
def _matrices(tracker: Tracker) -> tuple[ndarray, ndarray]:
    """p = A w + b p(1): A [41, 8], b [41], from the normal equations of the 39 free points."""
    eye_TT = np.eye(NUM_INSTANTS)
    at_waypoints_NT = eye_TT[INSTANTS_PER_WAYPOINT::INSTANTS_PER_WAYPOINT]
    acceleration = np.sqrt(tracker.acceleration) * np.diff(eye_TT, 2, axis=0) / DT_S**2
    jerk = np.sqrt(tracker.jerk) * np.diff(eye_TT, 3, axis=0) / DT_S**3
    rows_RT = np.concatenate([at_waypoints_NT, acceleration, jerk])
    target_RN = np.zeros((len(rows_RT), NUM_WAYPOINTS))
    target_RN[:NUM_WAYPOINTS] = np.eye(NUM_WAYPOINTS)
    free_RT, normal = rows_RT[:, 2:], rows_RT[:, 2:].T @ rows_RT[:, 2:]
    from_waypoints_TN, from_start_T = np.zeros((NUM_INSTANTS, NUM_WAYPOINTS)), eye_TT[1].copy()
    from_waypoints_TN[2:] = np.linalg.solve(normal, free_RT.T @ target_RN)
    from_start_T[2:] = np.linalg.solve(normal, -free_RT.T @ rows_RT[:, 1])
    return from_waypoints_TN, from_start_T
