"""Drawings say what they should: colours where things are, marks exactly where it is unsafe."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from rlalign.tasks.driving import Scorer, make_scene, track
from rlalign.tasks.driving.draw import (
    BLUE,
    BOTTOM,
    GREEN,
    GREY,
    ORANGE,
    ROAD,
    TOP,
    VERMILION,
    PlanView,
    draw_plans,
    reflection_gif,
    to_png,
)
from rlalign.tasks.errors import TaskError
from tests.tasks.driving.by_hand import road_user, straight_plan, straight_scene

Image = pytest.importorskip("PIL.Image")

SAFE, UNSAFE = np.zeros(8, bool), np.arange(8) >= 6


def share(image, colour) -> float:
    """Of the picture without its captions."""
    pixels = np.asarray(image)[TOP:-BOTTOM].astype(int)
    return float((np.abs(pixels - colour).max(-1) < 12).mean())


def test_what_is_unsafe_is_marked_and_nothing_else_changes():
    plan = straight_plan()[0]
    views = [PlanView(plan, SAFE, "before"), PlanView(plan, UNSAFE, "before")]
    safe, unsafe = draw_plans(straight_scene(), views)
    assert share(safe, VERMILION) == 0 and share(unsafe, VERMILION) > 0.001
    differ = np.abs(np.asarray(safe).astype(int) - np.asarray(unsafe)).max(-1) > 0
    columns = np.nonzero(differ.any(0))[0]
    assert columns.min() > 0.55 * safe.width  # the last two waypoints are far to the right
    one = draw_plans(straight_scene(), [PlanView(plan, np.arange(8) == 7, "before")])[0]
    assert 0 < share(one, VERMILION) < share(unsafe, VERMILION)


def test_users_have_their_colours():
    plan = PlanView(straight_plan()[0], SAFE, "")
    empty, vehicle, parked = (
        draw_plans(straight_scene(users), [plan])[0]
        for users in ([], [road_user(20, 4, vx=4)], [road_user(20, 4, kind="static")])
    )
    assert share(empty, ORANGE) == share(parked, ORANGE) == 0 < share(vehicle, ORANGE)
    assert share(empty, GREY) == share(vehicle, GREY) == 0 < share(parked, GREY)
    assert share(empty, BLUE) > 0.003 and share(empty, ROAD) > 0.2 and share(empty, GREEN) == 0


def test_frames_show_the_same_part_of_the_world():
    scene = make_scene(5)
    plans = track(np.stack([scene.expert_N2, 1.5 * scene.expert_N2]), scene.speed)
    unsafe = Scorer(scene).score(plans).safe() < 1
    views = [
        PlanView(p, u, f"step {i}") for i, (p, u) in enumerate(zip(plans, unsafe, strict=True))
    ]
    first, second = draw_plans(scene, views)
    assert first.size == second.size and first.width == 900 and 300 <= first.height <= 640
    assert share(first, GREEN) > 0
    pixels = [np.asarray(image)[TOP:-BOTTOM, :40] for image in (first, second)]
    assert np.array_equal(*pixels)  # behind the vehicle nothing moved


def test_files():
    plan = straight_plan()[0]
    images = draw_plans(straight_scene(), [PlanView(plan, SAFE, "a"), PlanView(plan, UNSAFE, "b")])
    png = Image.open(io.BytesIO(to_png(images[0])))
    assert png.format == "PNG" and np.array_equal(np.asarray(png), np.asarray(images[0]))
    gif = Image.open(io.BytesIO(reflection_gif(images, frame_s=0.5)))
    assert gif.format == "GIF" and gif.n_frames == 2 and gif.info["loop"] == 0
    assert gif.info["duration"] == 500
    gif.seek(1)
    assert gif.info["duration"] == 1500 and share(gif.convert("RGB"), VERMILION) > 0
    with pytest.raises(TaskError, match="no images"):
        reflection_gif([])


def test_without_pillow_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(TaskError, match=r"rlalign\[drive\]"):
        draw_plans(straight_scene(), [PlanView(straight_plan()[0], SAFE, "")])
