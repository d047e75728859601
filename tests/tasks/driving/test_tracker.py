"""The tracker is the minimiser it claims to be, linear, and close to what it follows."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.tasks.driving import Tracker, make_scene, track
from rlalign.tasks.driving.tracker import headings_of

RNG = np.random.default_rng(0)
WAYPOINTS = np.cumsum(RNG.normal([3.0, 0.3], 1.0, (5, 8, 2)), axis=1)


@pytest.mark.parametrize("tracker", [Tracker(), Tracker(1e-3, 1e-2)])
def test_no_other_path_from_the_same_start_costs_less(tracker):
    def cost(path, waypoints):
        """The definition, point by point."""
        total = 0.0
        for axis in (0, 1):
            p, w = path[:, axis], waypoints[:, axis]
            total += sum((p[5 * (n + 1)] - w[n]) ** 2 for n in range(8))
            for k in range(39):
                total += tracker.acceleration * ((p[k + 2] - 2 * p[k + 1] + p[k]) / 0.01) ** 2
            for k in range(38):
                third = p[k + 3] - 3 * p[k + 2] + 3 * p[k + 1] - p[k]
                total += tracker.jerk * (third / 0.001) ** 2
        return total

    for waypoints, path in zip(WAYPOINTS, track(WAYPOINTS, 5.0, tracker)[..., :2], strict=True):
        best = cost(path, waypoints)
        for k in range(2, 41):
            for change in ([1e-4, 0], [0, -1e-4]):
                other = path.copy()
                other[k] += change
                assert cost(other, waypoints) > best


def test_it_starts_where_and_as_fast_as_the_vehicle_does():
    states = track(WAYPOINTS, 7.5)
    assert np.abs(states[:, 0]).max() == 0
    assert np.allclose(states[:, 1, :2], [0.75, 0])


def test_superposition():
    a, b = WAYPOINTS[:1], WAYPOINTS[1:2]
    mixed = track(2 * a - 3 * b, 2 * 4.0 - 3 * 1.0)
    parts = 2 * track(a, 4.0) - 3 * track(b, 1.0)
    assert np.allclose(mixed[..., :2], parts[..., :2], atol=1e-9)


def test_an_expert_s_plan_is_followed():
    """The prototype's worst was 0.25 m."""
    worst = 0.0
    for seed in range(60):
        scene = make_scene(seed)
        path = track(scene.expert_N2[None], scene.speed)[0, 5::5, :2]
        worst = max(worst, float(np.hypot(*(path - scene.expert_N2).T).max()))
    assert 0.01 < worst < 0.3


def test_headings_of_a_circle_are_unwrapped():
    angle = np.linspace(0, 4 * np.pi, 41)
    circle = 20 * np.stack([np.sin(angle), 1 - np.cos(angle)], -1)[None]
    assert np.allclose(headings_of(circle)[0, 1:-1], angle[1:-1], atol=0.02)


def test_a_vehicle_that_stands_keeps_its_heading():
    assert np.abs(headings_of(np.zeros((1, 41, 2)))).max() == 0
    assert np.abs(track(np.zeros((1, 8, 2)), 0.0)).max() == 0
    seconds = 0.1 * np.arange(41)
    driven = np.minimum(seconds, 2.0) * 5  # to the left-forward, then a stop
    path = np.stack([driven * np.cos(0.3), driven * np.sin(0.3)], -1)[None]
    jitter = path + 0.001 * RNG.normal(size=path.shape)
    assert np.abs(headings_of(jitter)[0, 2:] - 0.3).max() < 0.02


def test_headings_while_it_stands_go_from_the_last_to_the_next():
    path = np.zeros((1, 41, 2))
    path[0, :11, 0] = 0.5 * np.arange(11)  # along x, a stop of 2 s, then along y
    path[0, 11:, 0] = 5.0
    path[0, 31:, 1] = 0.5 * np.arange(1, 11)
    heading = headings_of(path)[0]
    assert np.allclose(heading[:11], 0) and np.allclose(heading[30:], np.pi / 2)
    assert np.isclose(heading[20], np.pi / 4) and (np.diff(heading) >= -1e-9).all()
