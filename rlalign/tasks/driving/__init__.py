"""ToyDrive: a driving world that fits on a laptop, for planners that think in tokens.

>>> scene = make_scene(7)                                             # a road, traffic, an expert
>>> states = track(scene.expert_N2[None], scene.speed)                # [1, 41, 3]
>>> Scorer(scene, "gt").score(states).pdms_K                          # the PDM score
"""

from rlalign.tasks.driving.codebook import Codebook
from rlalign.tasks.driving.expert import make_scene, with_expert
from rlalign.tasks.driving.features import scene_features
from rlalign.tasks.driving.metrics import expert_distance, lane_distance
from rlalign.tasks.driving.scenes import Lane, RoadUser, Scene
from rlalign.tasks.driving.scorer import Scorer, Scores
from rlalign.tasks.driving.tracker import Tracker, track
from rlalign.tasks.driving.verifier import DrivingVerifier

__all__ = [
    "Codebook",
    "DrivingVerifier",
    "Lane",
    "RoadUser",
    "Scene",
    "Scorer",
    "Scores",
    "Tracker",
    "expert_distance",
    "lane_distance",
    "make_scene",
    "scene_features",
    "track",
    "with_expert",
]
