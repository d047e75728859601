"""Pictures of a scene from above: the road, its users, and a plan with its unsafe waypoints.

The plan is blue, a box of the ego vehicle at each waypoint; what is unsafe is vermilion and crossed
out, so that it can be told without colour. Users are orange, the static ones grey, with their real
positions after 1 to 4 s outlined; the expert's plan is a dotted green line. The colours are those
of Okabe and Ito, which the colour-blind can tell apart.

Legend: T = 41 instants, N = 8 waypoints, P points.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from rlalign.tasks.driving.geometry import corners, headings, shifted
from rlalign.tasks.driving.scenes import (
    EGO_CENTRE_M,
    EGO_LENGTH_M,
    EGO_WIDTH_M,
    INSTANTS_PER_WAYPOINT,
    Lane,
    RoadUser,
    Scene,
)
from rlalign.tasks.driving.tracker import track
from rlalign.tasks.errors import TaskError

WIDTH, MIN_HEIGHT, MAX_HEIGHT = 900, 300, 640  # pixels
TOP, BOTTOM, SIDE, LINE_HEIGHT = 44, 40, 12, 18
SAMPLES = 2  # pixels drawn for one that is kept, along each axis
MARGIN_M = 7.0
SECOND = 10  # instants
WHITE, INK, ROAD, LINE = (255, 255, 255), (40, 40, 40), (228, 228, 228), (160, 160, 160)
BLUE, VERMILION, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (230, 159, 0), (0, 158, 115)
GREY = (110, 110, 110)


@dataclass(frozen=True, slots=True, eq=False)
class PlanView:
    """A plan to draw: states [41, 3], which of its waypoints are unsafe, bool [8], and a title."""

    states_T3: ndarray
    unsafe_N: ndarray
    label: str


def draw_plans(scene: Scene, views: Sequence[PlanView]) -> list[Any]:
    """A Pillow image of each plan, 900 pixels wide and all of them of the same part of the world.

    Raises TaskError without Pillow.
    """
    if scene.expert_N2 is None:
        expert_N3 = np.zeros((0, 3))
    else:
        expert_N3 = _waypoints(track(scene.expert_N2[None], scene.speed)[0])
    shown = [expert_N3, *(_centres(view.states_T3) for view in views)]
    window = _Window(np.concatenate(shown)[:, :2])
    return [_draw(scene, view, expert_N3, window) for view in views]


def to_png(image: Any) -> bytes:
    """The file of one image."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def reflection_gif(images: Sequence[Any], frame_s: float = 0.9) -> bytes:
    """An endless animation of images of one size; the last one stays three times as long.

    Raises TaskError for no images.
    """
    if not images:
        raise TaskError("there are no images to animate: draw at least one plan")
    frame_ms, out = round(1000 * frame_s), io.BytesIO()
    durations = [frame_ms] * (len(images) - 1) + [3 * frame_ms]
    first, *others = (image.quantize(64, dither=0) for image in images)
    first.save(
        out, "GIF", save_all=True, append_images=others, duration=durations, loop=0, disposal=1
    )
    return out.getvalue()


class _Window:
    """From metres to pixels: the part of the world around `points_P2`, x to the right, y up."""

    def __init__(self, points_P2: ndarray) -> None:
        low, high = points_P2.min(0) - MARGIN_M, points_P2.max(0) + MARGIN_M
        room = np.array([WIDTH - 2 * SIDE, MAX_HEIGHT - TOP - BOTTOM])
        scale = float((room / (high - low)).min())
        height = max(MIN_HEIGHT, round(scale * float((high - low)[1])) + TOP + BOTTOM)
        self.size = (WIDTH, height)
        self.scale, self.middle = SAMPLES * scale, (low + high) / 2
        self.centre = SAMPLES * np.array([WIDTH / 2, (TOP + height - BOTTOM) / 2])

    def __call__(self, points_P2: ndarray) -> list[tuple[float, float]]:
        pixels_P2 = self.centre + self.scale * (points_P2 - self.middle) * np.array([1, -1])
        return [(float(x), float(y)) for x, y in pixels_P2]


def _draw(scene: Scene, view: PlanView, expert_N3: ndarray, window: _Window) -> Any:
    image_module, draw_module = _pillow("Image"), _pillow("ImageDraw")
    width, height = window.size
    image = image_module.new("RGB", (SAMPLES * width, SAMPLES * height), WHITE)
    canvas = draw_module.Draw(image)
    canvas.polygon(window(scene.drivable_P2), fill=ROAD, outline=LINE, width=2 * SAMPLES)
    for lane in scene.lanes:
        _draw_edges(canvas, window, lane)
    for user in scene.users:
        _draw_user(canvas, window, user)
    _draw_plan(canvas, window, view)
    for x, y in window(expert_N3[:, :2]):
        _dot(canvas, x, y, 4 * SAMPLES, GREEN)
    _caption(canvas, view, window.size)
    return image.resize(window.size, image_module.Resampling.LANCZOS)


def _draw_user(canvas: Any, window: _Window, user: RoadUser) -> None:
    colour = GREY if user.kind == "static" else ORANGE
    half = (user.length_m / 2, user.width_m / 2)
    if user.kind != "static":
        for later in range(SECOND, 4 * SECOND + 1, SECOND):
            box = window(corners(user.pose_T3[later], *half))
            canvas.polygon(box, outline=ORANGE, width=SAMPLES)
    canvas.polygon(window(corners(user.pose_T3[0], *half)), fill=colour, outline=INK, width=SAMPLES)


def _draw_plan(canvas: Any, window: _Window, view: PlanView) -> None:
    half = (EGO_LENGTH_M / 2, EGO_WIDTH_M / 2)
    centre_T3 = _centres(view.states_T3)
    canvas.polygon(window(corners(centre_T3[0], *half)), fill=BLUE, outline=INK, width=SAMPLES)
    canvas.line(window(centre_T3[:, :2]), fill=BLUE, width=2 * SAMPLES)
    waypoints_N3 = _waypoints(view.states_T3)
    for pose_3 in waypoints_N3[~view.unsafe_N]:
        canvas.polygon(window(corners(pose_3, *half)), outline=BLUE, width=SAMPLES)
        _dot(canvas, *window(pose_3[None, :2])[0], 3 * SAMPLES, BLUE)
    for pose_3 in waypoints_N3[view.unsafe_N]:
        canvas.polygon(window(corners(pose_3, *half)), outline=VERMILION, width=3 * SAMPLES)
    for x, y in window(waypoints_N3[view.unsafe_N, :2]):
        _dot(canvas, x, y, 9 * SAMPLES, WHITE)
        arm = 6 * SAMPLES
        for lean in (-arm, arm):
            canvas.line(
                [(x - lean, y - arm), (x + lean, y + arm)], fill=VERMILION, width=2 * arm // 3
            )


def _centres(states_T3: ndarray) -> ndarray:
    """Of the ego box, as poses [T, 3]."""
    centre_T3, heading_T = states_T3.copy(), states_T3[:, 2]
    centre_T3[:, :2] += EGO_CENTRE_M * np.stack([np.cos(heading_T), np.sin(heading_T)], -1)
    return centre_T3


def _waypoints(states_T3: ndarray) -> ndarray:
    return _centres(states_T3)[INSTANTS_PER_WAYPOINT::INSTANTS_PER_WAYPOINT]


def _caption(canvas: Any, view: PlanView, size: tuple[int, int]) -> None:
    load = _pillow("ImageFont").load_default
    title, small = load(20 * SAMPLES), load(14 * SAMPLES)
    width, height = SAMPLES * size[0], SAMPLES * size[1]
    canvas.rectangle([0, 0, width, SAMPLES * (TOP - 4)], fill=WHITE)
    canvas.rectangle([0, height - SAMPLES * (BOTTOM - 4), width, height], fill=WHITE)
    canvas.text((SIDE * SAMPLES, 10 * SAMPLES), view.label, fill=INK, font=title)
    x, y = SIDE * SAMPLES, height - (BOTTOM - 12) * SAMPLES
    for colour, name in (
        (BLUE, "plan, every 0.5 s"),
        (VERMILION, "unsafe (crossed out)"),
        (ORANGE, "road user, every 1 s"),
        (GREY, "parked"),
        (GREEN, "expert"),
    ):
        swatch = LINE_HEIGHT * SAMPLES
        canvas.rectangle([x, y + 2 * SAMPLES, x + swatch, y + swatch - 2 * SAMPLES], fill=colour)
        canvas.text((x + swatch + 6 * SAMPLES, y), name, fill=INK, font=small)
        x += swatch + 26 * SAMPLES + canvas.textlength(name, font=small)


def _draw_edges(canvas: Any, window: _Window, lane: Lane) -> None:
    """Both edges of a lane, dashed."""
    heading_P = headings(lane.points_P2)
    for side_m in (lane.width_m / 2, -lane.width_m / 2):
        pixels = window(shifted(lane.points_P2, heading_P, side_m))
        for start in range(0, len(pixels) - 2, 4):
            canvas.line(pixels[start : start + 3], fill=LINE, width=SAMPLES)


def _dot(canvas: Any, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
    canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def _pillow(module: str) -> Any:
    """A module of Pillow, by name."""
    try:
        return importlib.import_module(f"PIL.{module}")
    except ImportError as error:
        raise TaskError(f"drawings need Pillow ({error}): pip install 'rlalign[drive]'") from error
