"""How good a plan is: the PDM score of navsim v1.1 on the boxes and polygons of ToyDrive.

    PDMS = H Q,   H = NC DAC,   Q = (5 EP + 5 TTC + 2 C) / 12

    NC   1; 0 after a collision that is the ego vehicle's fault, 0.5 if with a static object
    DAC  1 if all four corners are in the drivable area at all times, else 0
    TTC  1 unless the ego vehicle, going on as it does for 0.9 s, would hit someone ahead
    C    1 if the motion is comfortable (comfort.py)
    EP   progress along the route, divided by the expert's; 1 where that is 5 m at most

A collision is nobody's fault while the ego vehicle stands or is hit from behind; it is the ego's
when the other stands or its own front bumper hits. Others touched at the first instant, or first
touched without fault, do not count again. "full" adds what navsim judges with lanes: collisions at
the side, and near ones, count while the ego vehicle straddles lanes or is off the road; C has all
bounds; EP is H times progress, divided by the better of plan and expert.

Source: arXiv 2509.20109 appendix C; Dauner et al., arXiv 2406.15349. Legend: K candidates, T = 41
instants, U road users, M pairs that may meet, N waypoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from rlalign.tasks.driving.comfort import comfortable
from rlalign.tasks.driving.geometry import corners, headings, overlap, project, shifted
from rlalign.tasks.driving.scenes import (
    DT_S,
    EGO_CENTRE_M,
    EGO_LENGTH_M,
    EGO_WIDTH_M,
    INSTANTS_PER_WAYPOINT,
    NUM_INSTANTS,
    NUM_WAYPOINTS,
    Lane,
    Oracle,
    Scene,
)
from rlalign.tasks.errors import TaskError

HALF_EGO = np.array([EGO_LENGTH_M / 2, EGO_WIDTH_M / 2])
HALF_BUMPER = np.array([0.0, EGO_WIDTH_M / 2])
STANDING = 0.05  # m/s
NO_PROJECTION_BELOW = 0.005  # m/s: a vehicle that stands is on its way to no one
LOOK_AHEAD = (3, 6, 9)  # instants
AHEAD_COS = np.cos(np.deg2rad(30.0))  # a cone around the heading, from the rear axle
MIN_PROGRESS_M = 5.0
WINDOW = 2  # instants around a waypoint that belong to it
FIDELITIES = ("simple", "full")


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Of K plans; all in [0, 1]. NaN in `progress_K` and `pdms_K` where a plan has a NaN.

    `nc_KT`, `dac_KT` and `ttc_KT` say when something was wrong: what holds at that instant.
    """

    nc_K: ndarray
    dac_K: ndarray
    ttc_K: ndarray
    comfort_K: ndarray
    progress_K: ndarray
    hard_K: ndarray
    pdms_K: ndarray
    nc_KT: ndarray
    dac_KT: ndarray
    ttc_KT: ndarray

    def safe(self, with_ttc: bool = False) -> ndarray:
        """Safety [K, 8] of each waypoint: the worst instant within 0.2 s of it, the first one's
        reaching back to the start. 1 at all of them exactly if H is 1; `with_ttc` counts a near
        collision as 0.5."""
        worst_KT = np.minimum(self.nc_KT, self.dac_KT)
        if with_ttc:
            worst_KT = np.minimum(worst_KT, 0.5 + 0.5 * self.ttc_KT)
        first_N = INSTANTS_PER_WAYPOINT * np.arange(1, NUM_WAYPOINTS + 1) - WINDOW
        first_N[0] = 0
        return np.minimum.reduceat(worst_KT, first_N, axis=1)


class Scorer:
    """Scores plans of one scene. `oracle` is who knows the others' future; `margin_m` narrows the
    drivable area. Raises TaskError without shapely or for a drivable area that crosses itself."""

    def __init__(
        self,
        scene: Scene,
        oracle: Oracle = "gt",
        fidelity: str = "simple",
        margin_m: float = 0.0,
    ) -> None:
        if fidelity not in FIDELITIES:
            raise TaskError(f"fidelity={fidelity!r} is none of {FIDELITIES}")
        self.scene, self.full = scene, fidelity == "full"
        self.pose_UT3, self.speed_UT = scene.futures(oracle)
        sizes = [(user.length_m / 2, user.width_m / 2) for user in scene.users]
        self.half_U2 = np.array(sizes).reshape(-1, 2)
        self.value_U = np.array([0.5 if user.kind == "static" else 0.0 for user in scene.users])
        self.drivable = _polygon(scene.drivable_P2, margin_m)
        self.lanes = [_polygon(_outline(lane), 0.0) for lane in scene.lanes] if self.full else []

    def score(self, states_KT3: ndarray) -> Scores:
        """Of plans as states (x, y, heading) of the rear axle, [K, 41, 3]."""
        if states_KT3.shape[1:] != (NUM_INSTANTS, 3):
            raise TaskError(f"plans are [K, {NUM_INSTANTS}, 3] states, not {states_KT3.shape}")
        velocity_KT2 = np.gradient(states_KT3[..., :2], DT_S, axis=1)
        centre_KT3 = _ahead(states_KT3, EGO_CENTRE_M)
        inside_KT = self.inside(centre_KT3)
        # Off the road or astride lanes, the side counts too; the simple reading knows no lanes.
        loose_KT = ~inside_KT | self._astride(centre_KT3) if self.full else np.zeros_like(inside_KT)
        nc_KT, overlapped_KU = self._collisions(states_KT3, velocity_KT2, centre_KT3, loose_KT)
        ttc_KT = self._near(states_KT3, velocity_KT2, centre_KT3, loose_KT, overlapped_KU)
        dac_KT = inside_KT.astype(float)
        nc_K, dac_K, ttc_K = nc_KT.min(1), dac_KT.min(1), ttc_KT.min(1)
        hard_K = nc_K * dac_K
        comfort_K = comfortable(states_KT3, self.full).astype(float)
        progress_K = self._relative_progress(centre_KT3, hard_K)
        pdms_K = hard_K * (5 * progress_K + 5 * ttc_K + 2 * comfort_K) / 12
        hard = (nc_K, dac_K, ttc_K, comfort_K, progress_K, hard_K, pdms_K)
        return Scores(*hard, nc_KT, dac_KT, ttc_KT)

    def inside(self, centre_KT3: ndarray) -> ndarray:
        """Whether the whole ego box at `centre_KT3` is in the drivable area, its border included:
        bool [K, T], for any number of instants."""
        return np.all(self._covers(self.drivable, centre_KT3), axis=-1)

    def progress_m(self, states_KT3: ndarray) -> ndarray:
        """Metres along the route, 0 at least: [K]."""
        return self._progress(_ahead(states_KT3, EGO_CENTRE_M))

    def _progress(self, centre_KT3: ndarray) -> ndarray:
        ends_M2 = centre_KT3[:, (0, -1), :2].reshape(-1, 2)
        along_K2 = project(ends_M2, self.scene.centreline_P2)[0].reshape(-1, 2)
        return np.maximum(along_K2[:, 1] - along_K2[:, 0], 0)

    def _relative_progress(self, centre_KT3: ndarray, hard_K: ndarray) -> ndarray:
        progress_K, bound = self._progress(centre_KT3), self.scene.progress_m
        if self.full:
            progress_K = progress_K * hard_K
            bound_K = np.maximum(progress_K, bound)
            share_K = progress_K / np.maximum(bound_K, MIN_PROGRESS_M)
            return np.where(bound_K <= MIN_PROGRESS_M, hard_K > 0, share_K)
        share_K = np.minimum(progress_K / max(bound, MIN_PROGRESS_M), 1)
        return np.where(np.isnan(share_K) | (bound > MIN_PROGRESS_M), share_K, 1.0)

    def _collisions(
        self, states_KT3: ndarray, velocity_KT2: ndarray, centre_KT3: ndarray, loose_KT: ndarray
    ) -> tuple[ndarray, ndarray]:
        """NC at each instant [K, T], and the users touched at the first one [K, U]."""
        shape = (*states_KT3.shape[:2], len(self.value_U))
        hit_KTU, fault_KTU = np.zeros(shape, bool), np.zeros(shape, bool)
        k, t, u = self._meeting(centre_KT3, 0)
        hit_KTU[k, t, u] = True
        speed_M = np.hypot(velocity_KT2[k, t, 0], velocity_KT2[k, t, 1])
        pose_M3, other_M3 = states_KT3[k, t], self.pose_UT3[u, t]
        bumper_M3 = _ahead(pose_M3, EGO_CENTRE_M + EGO_LENGTH_M / 2)
        front_M = overlap(bumper_M3, HALF_BUMPER, other_M3, self.half_U2[u])
        active_M = (_local(pose_M3, other_M3)[0] >= 0) & (front_M | loose_KT[k, t])
        stopped_M = self.speed_UT[u, t] <= STANDING
        fault_KTU[k, t, u] = (speed_M > STANDING) & (stopped_M | active_M)
        excused_KTU = hit_KTU & ~fault_KTU
        excused_KTU[:, 0] = hit_KTU[:, 0]
        excused_KTU = np.logical_or.accumulate(excused_KTU, axis=1)
        worth_KTU = np.where(hit_KTU & ~excused_KTU, self.value_U, 1.0)
        return worth_KTU.min(2, initial=1.0), hit_KTU[:, 0]

    def _near(
        self,
        states_KT3: ndarray,
        velocity_KT2: ndarray,
        centre_KT3: ndarray,
        loose_KT: ndarray,
        ignored_KU: ndarray,
    ) -> ndarray:
        """TTC at each instant, 0 or 1: [K, T]. A user first met without being ahead is ignored
        from then on, in the order of (instant, how far it looks ahead)."""
        moving_KT = np.hypot(velocity_KT2[..., 0], velocity_KT2[..., 1]) >= NO_PROJECTION_BELOW
        looks = (0, *LOOK_AHEAD) if self.full else LOOK_AHEAD
        shape = (*loose_KT.shape, len(looks), len(self.value_U))
        hit_KTLU, ahead_KTLU = np.zeros(shape, bool), np.zeros(shape, bool)
        for look, later in enumerate(looks):
            on_its_way_KT3 = centre_KT3.copy()
            on_its_way_KT3[..., :2] += later * DT_S * velocity_KT2
            k, t, u = self._meeting(on_its_way_KT3, later)
            # Where they will be, seen from where the ego vehicle is now: so navsim has it.
            x_M, y_M = _local(states_KT3[k, t], self.pose_UT3[u, t + later])
            cone_M = AHEAD_COS * np.hypot(x_M, y_M)
            hit_KTLU[k, t, look, u] = moving_KT[k, t] & ~ignored_KU[k, u]
            ahead_KTLU[k, t, look, u] = (x_M > cone_M) | (loose_KT[k, t] & (x_M >= -cone_M))
        in_order = (shape[0], shape[1] * shape[2], shape[3])
        passed_KQU = (hit_KTLU & ~ahead_KTLU).reshape(in_order)
        excused_KTLU = np.logical_or.accumulate(passed_KQU, axis=1).reshape(shape)
        return np.where(np.any(hit_KTLU & ~excused_KTLU, axis=(2, 3)), 0.0, 1.0)

    def _meeting(self, centre_KT3: ndarray, later: int) -> tuple[ndarray, ndarray, ndarray]:
        """The (candidate, instant, user) whose boxes meet, the users' `later` instants on."""
        other_TU3 = self.pose_UT3[:, later : later + centre_KT3.shape[1]].swapaxes(0, 1)
        reach_U = np.hypot(*self.half_U2.T) + np.hypot(*HALF_EGO)
        apart_KTU = (centre_KT3[..., None, 0] - other_TU3[..., 0]) ** 2
        apart_KTU += (centre_KT3[..., None, 1] - other_TU3[..., 1]) ** 2
        k, t, u = np.nonzero(apart_KTU <= reach_U**2)
        meet_M = overlap(centre_KT3[k, t], HALF_EGO, other_TU3[t, u], self.half_U2[u])
        return k[meet_M], t[meet_M], u[meet_M]

    def _astride(self, centre_KT3: ndarray) -> ndarray:
        """Whether no lane holds all corners and more than one holds some: bool [K, T]."""
        held_LKT = np.array([self._covers(lane, centre_KT3).sum(-1) for lane in self.lanes])
        return ((held_LKT > 0).sum(0) > 1) & (held_LKT < 4).all(0)

    def _covers(self, polygon: Any, centre_KT3: ndarray) -> ndarray:
        """Of each corner of the ego box: bool [K, T, 4]."""
        corners_KT42 = corners(centre_KT3, *HALF_EGO)
        return _shapely().intersects_xy(polygon, corners_KT42[..., 0], corners_KT42[..., 1])


def _ahead(pose: ndarray, distance_m: float) -> ndarray:
    """Poses [..., 3] moved along their heading."""
    moved = pose.copy()
    moved[..., 0] += distance_m * np.cos(pose[..., 2])
    moved[..., 1] += distance_m * np.sin(pose[..., 2])
    return moved


def _local(pose_M3: ndarray, other_M3: ndarray) -> tuple[ndarray, ndarray]:
    """Where others are, seen from poses: metres forward [M], and to the left [M]."""
    dx_M, dy_M = other_M3[:, 0] - pose_M3[:, 0], other_M3[:, 1] - pose_M3[:, 1]
    cos_M, sin_M = np.cos(pose_M3[:, 2]), np.sin(pose_M3[:, 2])
    return dx_M * cos_M + dy_M * sin_M, dy_M * cos_M - dx_M * sin_M


def _outline(lane: Lane) -> ndarray:
    heading_P, half = headings(lane.points_P2), lane.width_m / 2
    left_P2 = shifted(lane.points_P2, heading_P, half)
    return np.concatenate([left_P2, shifted(lane.points_P2, heading_P, -half)[::-1]])


def _polygon(outline_P2: ndarray, margin_m: float) -> Any:
    """Prepared for many questions. Raises TaskError for an outline that crosses itself."""
    shapely = _shapely()
    try:
        polygon = shapely.Polygon(outline_P2)
    except ValueError as error:
        raise TaskError(f"an area with {len(outline_P2)} points is no polygon: {error}") from error
    if not polygon.is_valid:
        reason = shapely.is_valid_reason(polygon)
        raise TaskError(f"the outline of a lane or of the drivable area is no polygon: {reason}")
    if margin_m:
        polygon = polygon.buffer(-margin_m, join_style="mitre")
    shapely.prepare(polygon)
    return polygon


def _shapely() -> Any:
    try:
        import shapely
    except ImportError as error:
        raise TaskError(
            f"driving scenes need shapely ({error}): pip install 'rlalign[drive]'"
        ) from error
    return shapely
