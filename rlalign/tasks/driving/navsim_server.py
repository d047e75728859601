"""The server side of driving/navsim.py: the PDM score of the navsim devkit, in the devkit's Python.

    python navsim_server.py DESCRIPTOR METRIC_CACHE_FOLDER

It needs Python 3.9, the devkit (branch v1.1) and nothing of rlalign, which starts it with a
connected socket as DESCRIPTOR. Messages are 8 bytes of length, big-endian, and JSON. The metric
cache is what the devkit's caching script wrote; the devkit reads it with pickle, so it must be your
own.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
import inspect
import json
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct("!Q")
NUM_INSTANTS, DT_S = 41, 0.1


def serve(
    connection: socket.socket, metric: str, score: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Announce `metric`, then answer requests with `score(request)` until the client is gone. What
    it raises goes back as the error of that request."""
    _send(connection, {"metric": metric})
    while True:
        head = _read(connection, HEADER.size)
        if head is None:
            return
        request = json.loads(_read(connection, HEADER.unpack(head)[0]) or b"{}")
        try:
            reply = score(request)
        except Exception:
            reply = {"error": traceback.format_exc(limit=-3)}
        reply["id"] = request.get("id")
        _send(connection, reply)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    connection.sendall(HEADER.pack(len(body)) + body)


def _read(connection: socket.socket, size: int) -> bytes | None:
    """None when the client is gone."""
    buffer = b""
    while len(buffer) < size:
        chunk = connection.recv(size - len(buffer))
        if not chunk:
            return None
        buffer += chunk
    return buffer


class Devkit:
    """navsim v1.1: `score` answers one request for one scene and K plans."""

    def __init__(self, cache_folder: str) -> None:
        from pathlib import Path

        from navsim.common.dataloader import MetricCacheLoader
        from navsim.evaluate.pdm_score import pdm_score
        from navsim.planning.simulation.planner.pdm_planner.scoring.pdm_scorer import PDMScorer
        from navsim.planning.simulation.planner.pdm_planner.simulation.pdm_simulator import (
            PDMSimulator,
        )
        from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling

        reactive = "traffic_agents_policy" in inspect.signature(pdm_score).parameters
        self.metric = "epdms-v2" if reactive else "pdms-v1.1"
        self.sampling = TrajectorySampling(num_poses=NUM_INSTANTS - 1, interval_length=DT_S)
        self.simulator = PDMSimulator(self.sampling)
        self.scorer = PDMScorer(self.sampling)
        self.caches = MetricCacheLoader(Path(cache_folder))

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sub-scores of `poses` [K, 8, 3] in scene `token`, others as `oracle` says."""
        import numpy as np
        from navsim.planning.simulation.planner.pdm_planner.utils.pdm_enums import (
            EgoAreaIndex,
            MultiMetricIndex,
            WeightedMetricIndex,
        )

        cache = self.caches.get_from_token(request["token"])
        observation = cache.observation
        if request["oracle"] == "cv":
            observation = constant_velocity(observation)
        states = self._simulate(cache, request["poses"], request["interval_s"])
        # The devkit's own plan comes first: progress is measured against it.
        self.scorer.score_proposals(
            states, observation, cache.centerline, cache.route_lane_ids, cache.drivable_area_map
        )
        scorer, plans = self.scorer, slice(1, None)
        multi, weighted = scorer._multi_metrics, scorer._weighted_metrics
        nc, dac = (
            multi[index, plans]
            for index in (MultiMetricIndex.NO_COLLISION, MultiMetricIndex.DRIVABLE_AREA)
        )
        # Progress against the devkit's plan alone: the other candidates must not change it.
        raw = scorer._progress_raw * multi.prod(axis=0)
        best = np.maximum(raw[plans], raw[0])
        threshold = scorer._config.progress_distance_threshold
        progress = np.where(
            best > threshold, raw[plans] / np.maximum(best, threshold), (nc * dac > 0).astype(float)
        )
        ttc = weighted[WeightedMetricIndex.TTC, plans]
        comfort = weighted[WeightedMetricIndex.COMFORTABLE, plans]
        columns = {"nc": nc, "dac": dac, "ttc": ttc, "comfort": comfort, "progress": progress}
        columns["pdms"] = nc * dac * (5 * progress + 5 * ttc + 2 * comfort) / 12
        columns["dac_steps"] = ~scorer._ego_areas[plans, :, EgoAreaIndex.NON_DRIVABLE_AREA]
        columns["nc_steps"] = _at(scorer._collision_time_idcs[plans], nc)
        columns["ttc_steps"] = _at(scorer._ttc_time_idcs[plans], ttc)
        return {name: np.asarray(value, dtype=float).tolist() for name, value in columns.items()}

    def _simulate(self, cache: Any, poses: Any, interval_s: float) -> Any:
        """States of the devkit's plan and of ours, as its controller drives them."""
        import numpy as np
        from navsim.common.dataclasses import Trajectory
        from navsim.evaluate.pdm_score import get_trajectory_as_array, transform_trajectory
        from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling

        start = cache.ego_state
        paths = [cache.trajectory]
        for plan in np.array(poses, dtype=np.float32):
            sampling = TrajectorySampling(num_poses=len(plan), interval_length=interval_s)
            paths.append(transform_trajectory(Trajectory(plan, sampling), start))
        arrays = [get_trajectory_as_array(p, self.sampling, start.time_point) for p in paths]
        return self.simulator.simulate_proposals(np.stack(arrays), start)


def constant_velocity(observation: Any) -> Any:
    """A copy in which all that is there at first goes on as it does; nothing else ever appears."""
    from navsim.planning.simulation.planner.pdm_planner.observation.pdm_occupancy_map import (
        PDMOccupancyMap,
    )
    from shapely.affinity import translate

    first, objects = observation._occupancy_maps[0], observation.unique_objects
    interval_s = observation._observation_sample_res * observation._sample_interval
    velocity = {}
    for token in first.tokens:  # static objects and red lights have no velocity
        moving = getattr(objects.get(token), "velocity", None)
        velocity[token] = (moving.x, moving.y) if moving is not None else (0.0, 0.0)
    predicted = copy.copy(observation)
    predicted._occupancy_maps = [
        PDMOccupancyMap(
            first.tokens,
            [
                translate(first[t], *(v * step * interval_s for v in velocity[t]))
                for t in first.tokens
            ],
        )
        for step in range(len(observation._occupancy_maps))
    ]
    return predicted


def _at(first_step: Any, value: Any) -> Any:
    """1 at all steps but the one at which a plan got its `value`: [K, 41]."""
    import numpy as np

    steps = np.ones((len(value), NUM_INSTANTS))
    for row, step, worth in zip(steps, first_step, value):  # noqa: B905 - Python 3.9
        if np.isfinite(step):
            row[int(step)] = worth
    return steps


if __name__ == "__main__":
    devkit = Devkit(sys.argv[2])
    serve(socket.socket(fileno=int(sys.argv[1])), devkit.metric, devkit.score)
