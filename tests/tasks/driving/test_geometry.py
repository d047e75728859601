"""Boxes and polylines against shapely and against arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.tasks.driving.geometry import arc_lengths, corners, headings, overlap, project, shifted

shapely = pytest.importorskip("shapely")

POSES = st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(-7, 7))
HALVES = st.tuples(st.floats(0.1, 4), st.floats(0.1, 4))


@settings(deadline=None, max_examples=300)
@given(POSES, HALVES, POSES, HALVES)
def test_boxes_overlap_when_their_polygons_do(a, half_a, b, half_b):
    polygons = [
        shapely.Polygon(corners(np.array(pose), *half)) for pose, half in ((a, half_a), (b, half_b))
    ]
    if abs(polygons[0].distance(polygons[1])) < 1e-9 and polygons[0].touches(polygons[1]):
        return  # rounding decides
    mine = overlap(np.array(a), np.array(half_a), np.array(b), np.array(half_b))
    assert bool(mine) == polygons[0].intersects(polygons[1])


def test_touching_is_overlapping():
    half, here = np.array([2.0, 1.0]), np.zeros(3)
    for there in ([4.0, 0, 0], [0, 2.0, 0], [4.0, 2.0, 0], [3.0, 0, np.pi / 2]):
        assert overlap(here, half, np.array(there), half)
        assert not overlap(here, half, np.array(there) * [1.001, 1.001, 1], half)


def test_corners_go_round_from_the_front_left():
    expected = [[2, 4], [0, 4], [0, 0], [2, 0]]
    turned = corners(np.array([1.0, 2.0, np.pi / 2]), 2.0, 1.0)
    assert np.allclose(turned, np.array(expected)[[1, 2, 3, 0]])


def test_projection_on_a_path():
    path = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0]])
    points = np.array([[3.0, 2.0], [12.0, 5.0], [-4.0, 3.0], [13.0, 14.0]])
    along, away = project(points, path)
    assert np.allclose(along, [3, 15, 0, 20]) and np.allclose(away, [2, 2, 5, 5])
    twice = project(points, np.repeat(path, 2, axis=0))
    assert np.allclose(twice[0], along) and np.allclose(twice[1], away)
    line = shapely.LineString(path)
    rng = np.random.default_rng(0)
    points = rng.uniform(-5, 15, (200, 2))
    assert np.allclose(project(points, path)[1], [line.distance(shapely.Point(p)) for p in points])


def test_a_path_moved_to_its_left():
    angle = np.linspace(0, 1, 200)
    circle = 10 * np.stack([np.cos(angle), np.sin(angle)], -1)  # counter-clockwise
    inner = shifted(circle, headings(circle), 2.0)
    assert np.allclose(np.hypot(*inner.T), 8, atol=1e-3)
    assert np.isclose(arc_lengths(circle)[-1], 10, atol=1e-3)
