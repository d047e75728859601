"""Is a motion comfortable? Accelerations, jerks and turning rates within the bounds of nuPlan.

Derivatives come from the states alone, smoothed before they are judged: "simple" by means of 7
instants, "full" by local polynomials (Savitzky and Golay 1964) of the windows of navsim v1.1. Both
are matrices, computed once.

Legend: K candidates, T instants 0.1 s apart.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy import ndarray

from rlalign.tasks.driving.scenes import DT_S

MAX_JERK, MAX_LONGITUDINAL_JERK = 8.37, 4.13  # m/s^3
MAX_LATERAL_ACCELERATION = 4.89  # m/s^2
LONGITUDINAL_ACCELERATION = (-4.05, 2.40)  # m/s^2
MAX_YAW_RATE, MAX_YAW_ACCELERATION = 0.95, 1.93  # rad/s, rad/s^2
MEAN_INSTANTS = 7


def comfortable(states_KT3: ndarray, full: bool = False) -> ndarray:
    """Bool [K] of states (x, y, heading), headings unwrapped."""
    return _full(states_KT3) if full else _simple(states_KT3)


def _simple(states_KT3: ndarray) -> ndarray:
    differ_TT, mean_TT = _difference(states_KT3.shape[1]), _mean(states_KT3.shape[1])
    velocity_KT2 = differ_TT @ states_KT3[..., :2]
    acceleration_KT2 = mean_TT @ (differ_TT @ velocity_KT2)
    jerk_KT2 = mean_TT @ (differ_TT @ acceleration_KT2)
    longitudinal_KT, lateral_KT = _in_ego_axes(acceleration_KT2, states_KT3[..., 2])
    yaw_rate_KT = (states_KT3[..., 2] @ differ_TT.T) @ mean_TT.T
    return (
        _below(np.hypot(jerk_KT2[..., 0], jerk_KT2[..., 1]), MAX_JERK)
        & _below(lateral_KT, MAX_LATERAL_ACCELERATION)
        & _between(longitudinal_KT, LONGITUDINAL_ACCELERATION)
        & _below(yaw_rate_KT, MAX_YAW_RATE)
    )


def _full(states_KT3: ndarray) -> ndarray:
    num, heading_KT = states_KT3.shape[1], states_KT3[..., 2]
    acceleration_KT2 = _polynomial(num, 5, 2, 2) @ states_KT3[..., :2]
    longitudinal_KT, lateral_KT = _in_ego_axes(acceleration_KT2, heading_KT)
    size_KT = np.hypot(longitudinal_KT, lateral_KT)
    smooth_TT, short_TT = _polynomial(num, num, 2, 0), _polynomial(num, 9, 2, 0)
    jerk_TT = _polynomial(num, num, 2, 1) @ short_TT
    yaw_rate_KT = heading_KT @ _polynomial(num, 5, 2, 1).T
    yaw_acceleration_KT = heading_KT @ _polynomial(num, 5, 3, 2).T
    return (
        _below(size_KT @ jerk_TT.T, MAX_JERK)
        & _below(longitudinal_KT @ jerk_TT.T, MAX_LONGITUDINAL_JERK)
        & _below(lateral_KT @ smooth_TT.T, MAX_LATERAL_ACCELERATION)
        & _between(longitudinal_KT @ smooth_TT.T, LONGITUDINAL_ACCELERATION)
        & _below(yaw_rate_KT, MAX_YAW_RATE)
        & _below(yaw_acceleration_KT, MAX_YAW_ACCELERATION)
    )


def _in_ego_axes(vector_KT2: ndarray, heading_KT: ndarray) -> tuple[ndarray, ndarray]:
    cos_KT, sin_KT = np.cos(heading_KT), np.sin(heading_KT)
    x_KT, y_KT = vector_KT2[..., 0], vector_KT2[..., 1]
    return x_KT * cos_KT + y_KT * sin_KT, y_KT * cos_KT - x_KT * sin_KT


def _below(value_KT: ndarray, bound: float) -> ndarray:
    return np.all(np.abs(value_KT) < bound, axis=1)


def _between(value_KT: ndarray, bounds: tuple[float, float]) -> ndarray:
    return np.all((value_KT > bounds[0]) & (value_KT < bounds[1]), axis=1)


@functools.cache
def _difference(num: int) -> ndarray:
    """First derivative: central differences, one-sided at the ends."""
    return np.gradient(np.eye(num), DT_S, axis=0)


@functools.cache
def _mean(num: int) -> ndarray:
    """Mean of the (at the ends fewer than) 7 instants around each."""
    apart_TT = np.abs(np.subtract.outer(np.arange(num), np.arange(num)))
    near_TT = (apart_TT <= MEAN_INSTANTS // 2).astype(float)
    return near_TT / near_TT.sum(1, keepdims=True)


@functools.cache
def _polynomial(num: int, window: int, order: int, derivative: int) -> ndarray:
    """Derivative of the least-squares polynomial of `window` instants around each; at the ends the
    window is the first or the last one that fits."""
    matrix_TT = np.zeros((num, num))
    for t in range(num):
        first = min(max(t - window // 2, 0), num - window)
        seconds = (np.arange(first, first + window) - t) * DT_S
        fit = np.linalg.pinv(seconds[:, None] ** np.arange(order + 1))
        factorial = float(np.prod(np.arange(1, derivative + 1)))
        matrix_TT[t, first : first + window] = factorial * fit[derivative]
    return matrix_TT
