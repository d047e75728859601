"""The server must run where rlalign does not: Python 3.9, the standard library, a devkit.

The devkit is replaced by stand-ins that give back recorded arrays, so what is tested is what the
server makes of them.
"""

from __future__ import annotations

import ast
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.tasks.driving.fake_navsim import SERVER, load_server

PDM = "navsim.planning.simulation.planner.pdm_planner"


def test_it_is_python_3_9_and_imports_nothing_else_before_it_must():
    tree = ast.parse(SERVER.read_text(), feature_version=(3, 9))
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {str(name).split(".")[0] for name in names} <= set(sys.stdlib_module_names)


class RecordedScorer:
    """Three plans after the devkit's own: 20 m without fault, 60 m with half a fault, 40 m off the
    road; the devkit's own plan makes 25 m."""

    def __init__(self, sampling):
        self._config = SimpleNamespace(progress_distance_threshold=5.0)

    def score_proposals(self, states, observation, *rest):
        assert states.shape[0] == 4 and states[0, 0, 0] == -1  # the devkit's plan comes first
        self.seen = observation
        self._multi_metrics = np.array([[1, 1, 0.5, 1], [1, 1, 1, 0.0]])
        self._weighted_metrics = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1.0]])
        self._progress_raw = np.array([25.0, 20, 60, 40])
        self._collision_time_idcs = np.array([np.inf, np.inf, 12, np.inf])
        self._ttc_time_idcs = np.array([np.inf, 7, np.inf, np.inf])
        self._ego_areas = np.zeros((4, 41, 3), bool)
        self._ego_areas[3, 30:, 1] = True


@pytest.fixture
def devkit(monkeypatch):
    """A server whose devkit is recorded."""

    def module(name, **content):
        found = ModuleType(name)
        vars(found).update(content)
        monkeypatch.setitem(sys.modules, name, found)

    def sampling(**sizes):
        return SimpleNamespace(**sizes)

    first = SimpleNamespace(time_point=0)
    scene = SimpleNamespace(ego_state=first, trajectory=np.full((41, 3), -1.0), observation="real")
    scene.centerline = scene.route_lane_ids = scene.drivable_area_map = None
    loader = SimpleNamespace(get_from_token=lambda token: {"scene": scene}[token])
    module("navsim.common.dataloader", MetricCacheLoader=lambda folder: loader)
    module("navsim.common.dataclasses", Trajectory=lambda poses, sampling: poses)
    module(
        "navsim.evaluate.pdm_score",
        pdm_score=lambda metric_cache, model_trajectory: None,
        transform_trajectory=lambda poses, start: np.repeat(poses, 6, 0)[:41],
        get_trajectory_as_array=lambda path, sampling, start: path,
    )
    module(f"{PDM}.scoring.pdm_scorer", PDMScorer=RecordedScorer)
    module(
        f"{PDM}.simulation.pdm_simulator",
        PDMSimulator=lambda s: SimpleNamespace(simulate_proposals=lambda states, start: states),
    )
    module(
        f"{PDM}.utils.pdm_enums",
        MultiMetricIndex=SimpleNamespace(NO_COLLISION=0, DRIVABLE_AREA=1),
        WeightedMetricIndex=SimpleNamespace(PROGRESS=0, TTC=1, COMFORTABLE=2),
        EgoAreaIndex=SimpleNamespace(NON_DRIVABLE_AREA=1),
    )
    module("nuplan.planning.simulation.trajectory.trajectory_sampling", TrajectorySampling=sampling)
    return load_server().Devkit("/cache")


def test_each_plan_is_measured_against_the_devkit_s_alone(devkit):
    """20 m are worth 20 / 25; the devkit, scoring all in one batch, would say 20 / 30."""
    poses = np.zeros((3, 8, 3)).tolist()
    reply = devkit.score({"token": "scene", "poses": poses, "interval_s": 0.5, "oracle": "gt"})
    assert devkit.metric == "pdms-v1.1" and devkit.scorer.seen == "real"
    assert reply["progress"] == pytest.approx([20 / 25, 1, 0])
    assert reply["nc"] == [1, 0.5, 1] and reply["dac"] == [1, 1, 0]
    expected = [(5 * 0.8 + 0 + 2) / 12, 0.5 * (5 * 1 + 5 + 0) / 12, 0]
    assert reply["pdms"] == pytest.approx(expected)
    nc, dac, ttc = (np.array(reply[f"{name}_steps"]) for name in ("nc", "dac", "ttc"))
    assert nc[1, 12] == 0.5 and nc.sum() == 3 * 41 - 0.5
    assert ttc[0, 7] == 0 and ttc.sum() == 3 * 41 - 1
    assert not dac[2, 30:].any() and dac.sum() == 3 * 41 - 11


def test_constant_velocity_moves_what_is_there_and_nothing_else(monkeypatch):
    shapely = pytest.importorskip("shapely")

    class Map(dict):
        def __init__(self, tokens, geometries):
            super().__init__(zip(tokens, geometries, strict=True))
            self.tokens = tokens

    module = ModuleType(f"{PDM}.observation.pdm_occupancy_map")
    module.PDMOccupancyMap = Map
    monkeypatch.setitem(sys.modules, module.__name__, module)
    box, cone = shapely.box(0, 0, 4, 2), shapely.box(9, 9, 10, 10)
    maps = [Map(["car", "cone"], [box, cone]), Map(["car", "late"], [cone, cone]), Map([], [])]
    car = SimpleNamespace(velocity=SimpleNamespace(x=3.0, y=-1.0))
    observation = SimpleNamespace(
        _occupancy_maps=maps,
        unique_objects={"car": car, "cone": SimpleNamespace()},
        _observation_sample_res=2,
        _sample_interval=0.1,
    )
    predicted = load_server().constant_velocity(observation)._occupancy_maps
    assert [m.tokens for m in predicted] == [["car", "cone"]] * 3
    assert predicted[2]["car"].bounds == pytest.approx((1.2, -0.4, 5.2, 1.6))  # after 0.4 s
    assert predicted[2]["cone"].equals(cone) and observation._occupancy_maps is maps
