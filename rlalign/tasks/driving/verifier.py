"""ToyDrive as a verifier of token plans: the PDM score, and which waypoints are unsafe.

Legend: B plans, T = 16 tokens, N = 8 waypoints.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from rlalign.tasks.driving.codebook import Codebook
from rlalign.tasks.driving.scenes import NUM_WAYPOINTS, Oracle, Scene
from rlalign.tasks.driving.scorer import Scorer, Scores
from rlalign.tasks.driving.tracker import SMOOTH, Tracker, track
from rlalign.tasks.verifier import Verdict

logger = logging.getLogger(__name__)


class DrivingVerifier:
    """Judges plans of one scene. `oracle` is who knows the others' future: "gt" to measure, "cv"
    for a search that may only extrapolate. `with_ttc` lets a near collision make a waypoint unsafe.

    Raises TaskError as `Scorer` does.
    """

    num_units = NUM_WAYPOINTS

    def __init__(
        self,
        scene: Scene,
        codebook: Codebook,
        oracle: Oracle = "cv",
        *,
        with_ttc: bool = False,
        fidelity: str = "simple",
        tracker: Tracker = SMOOTH,
    ) -> None:
        self.codebook, self.with_ttc, self.tracker = codebook, with_ttc, tracker
        self.scorer = Scorer(scene, oracle, fidelity)

    def judge(self, ids_BT: Tensor) -> Verdict:
        """As `Verifier` says. A plan whose score is NaN counts as 0, unsafe everywhere."""
        scores = self.scores(ids_BT)
        invalid_B = np.isnan(scores.pdms_K)
        if invalid_B.any():
            logger.warning("%d of %d plans have no score and count as 0", *_counts(invalid_B))
        valid_B = torch.from_numpy(~invalid_B)
        parts = (scores.pdms_K, scores.safe(self.with_ttc), scores.hard_K)
        score_B, safe_BN, hard_B = (torch.from_numpy(np.nan_to_num(part)) for part in parts)
        return Verdict(
            score_B * valid_B, safe_BN * valid_B[:, None], hard_B * valid_B, int(invalid_B.sum())
        )

    def scores(self, ids_BT: Tensor) -> Scores:
        """All sub-scores of token plans. Raises TaskError for tokens that are no waypoints."""
        waypoints_BN2 = self.codebook.decode(ids_BT)
        return self.scorer.score(track(waypoints_BN2, self.scorer.scene.speed, self.tracker))


def _counts(flag_B: np.ndarray) -> tuple[int, int]:
    return int(flag_B.sum()), len(flag_B)
