"""Verifiers of token plans: a PDM score, and which waypoints are unsafe.

Legend: B plans, T = 16 tokens, N = 8 waypoints, K = B plans as the scorer knows them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from rlalign.tasks.driving.codebook import Codebook
from rlalign.tasks.driving.scenes import NUM_WAYPOINTS, Oracle, Scene
from rlalign.tasks.driving.scorer import Scorer, Scores
from rlalign.tasks.driving.tracker import SMOOTH, Tracker, track
from rlalign.tasks.verifier import Verdict

logger = logging.getLogger(__name__)


class PlanVerifier:
    """Judges plans of a vehicle that drives `speed` m/s, with any scorer of states [K, 41, 3].

    `with_ttc` lets a near collision make a waypoint unsafe too.
    """

    num_units = NUM_WAYPOINTS

    def __init__(
        self,
        score: Callable[[ndarray], Scores],
        speed: float,
        codebook: Codebook,
        *,
        with_ttc: bool = False,
        tracker: Tracker = SMOOTH,
    ) -> None:
        self.score, self.speed, self.codebook = score, speed, codebook
        self.with_ttc, self.tracker = with_ttc, tracker

    def judge(self, ids_BT: Tensor) -> Verdict:
        """As `Verifier` says. A plan whose score is NaN counts as 0, unsafe everywhere."""
        scores = self.scores(ids_BT)
        valid_B = ~np.isnan(scores.pdms_K)
        num_invalid = int((~valid_B).sum())
        if num_invalid:
            logger.warning(
                "%d of %d plans have no score: they count as 0", num_invalid, len(ids_BT)
            )
        score_B, hard_B = (np.where(valid_B, x, 0.0) for x in (scores.pdms_K, scores.hard_K))
        safe_BN = np.where(valid_B[:, None], scores.safe(self.with_ttc), 0.0)
        arrays = (torch.from_numpy(array) for array in (score_B, safe_BN, hard_B))
        return Verdict(*arrays, num_invalid=num_invalid)

    def scores(self, ids_BT: Tensor) -> Scores:
        """All sub-scores of token plans. Raises TaskError for tokens that are no waypoints."""
        waypoints_KN2 = self.codebook.decode(ids_BT)
        return self.score(track(waypoints_KN2, self.speed, self.tracker))


class DrivingVerifier(PlanVerifier):
    """Judges plans of a scene of ToyDrive. `oracle` is who knows the others' future: "gt" to
    measure, "cv" for a search that may only extrapolate. Raises TaskError as `Scorer` does."""

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
        score = Scorer(scene, oracle, fidelity).score
        super().__init__(score, scene.speed, codebook, with_ttc=with_ttc, tracker=tracker)
