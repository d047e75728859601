"""Motions with known derivatives, on either side of each bound."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.tasks.driving.comfort import comfortable

SECONDS = 0.1 * np.arange(41)
BOTH = pytest.mark.parametrize("full", [False, True])


def along_x(driven: np.ndarray) -> np.ndarray:
    return np.stack([driven, 0 * driven, 0 * driven], -1)[None]


def circle(speed: float, yaw_rate: float) -> np.ndarray:
    angle, radius = yaw_rate * SECONDS, speed / yaw_rate
    return np.stack([radius * np.sin(angle), radius * (1 - np.cos(angle)), angle], -1)[None]


@BOTH
@pytest.mark.parametrize(("acceleration", "fine"), [(2.35, True), (2.45, False), (-4.0, True)])
def test_longitudinal_acceleration(full, acceleration, fine):
    driven = 20 * SECONDS + acceleration * SECONDS**2 / 2
    assert comfortable(along_x(driven), full)[0] == fine
    assert not comfortable(along_x(20 * SECONDS - 4.1 * SECONDS**2 / 2), full)[0]


@BOTH
def test_lateral_acceleration(full):
    assert comfortable(circle(10, 0.47), full)[0]  # 4.7 m/s^2
    assert not comfortable(circle(10, 0.51), full)[0]  # 5.1 m/s^2


@BOTH
def test_yaw_rate(full):
    assert comfortable(circle(2, 0.93), full)[0] and comfortable(circle(2, -0.93), full)[0]
    assert not comfortable(circle(2, 0.97), full)[0]


@BOTH
@pytest.mark.parametrize(("jerk", "fine"), [(1, True), (-1, True), (1.7, False), (-1.7, False)])
def test_constant_jerk(full, jerk, fine):
    """The acceleration runs from -2 to 2 times the jerk, of which 2.4 may be reached forwards."""
    driven = 20 * SECONDS - 2 * jerk * SECONDS**2 / 2 + jerk * SECONDS**3 / 6
    assert comfortable(along_x(driven), full)[0] == fine


def test_a_change_of_mind_that_only_the_jerk_forbids():
    for acceleration, fine in ((2.0, True), (4.7, False)):  # to the left, then to the right
        late = np.maximum(SECONDS - 2, 0)
        y = acceleration * (SECONDS**2 / 2 - late**2)
        states = np.stack([8 * SECONDS, y, 0 * y], -1)[None]
        assert comfortable(states)[0] == fine


def test_only_full_bounds_the_yaw_acceleration():
    heading = 0.1 * np.sin(2 * np.pi * SECONDS)  # 0.6 rad/s, 3.9 rad/s^2
    states = np.stack([SECONDS, 0 * SECONDS, heading], -1)[None]
    assert comfortable(states)[0] and not comfortable(states, full=True)[0]


def test_each_plan_is_judged_alone():
    plans = np.concatenate([circle(10, 0.3), circle(10, 0.6), circle(5, 0.2)])
    assert comfortable(plans).tolist() == [True, False, True]
