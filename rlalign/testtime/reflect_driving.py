"""ToyDrive for `rlalign decode reflect`: waypoints are repaired from the first unsafe one on.

Needs the packages of `rlalign[drive]`. The score of a repair is the benchmark's own under `oracle`
(`cv`: other road users keep their velocity; `gt`: their real futures); `measure` is always under
`gt`, with the distance to the expert's plan, which the score does not contain.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.config import ReflectConfig, parse
from rlalign.models.building import Progress
from rlalign.models.planner import load_planner
from rlalign.models.planner_train import FIRST_TEST_SEED, build_planner
from rlalign.tasks.driving import (
    DrivingVerifier,
    Scene,
    expert_distance,
    make_scene,
    track,
    with_expert,
)
from rlalign.tasks.driving.draw import PlanView, draw_plans, reflection_gif
from rlalign.tasks.driving.scenes import NUM_WAYPOINTS
from rlalign.tasks.errors import TaskError
from rlalign.testtime.domain import Item, item_name
from rlalign.testtime.drafts import GoalDrafts, SampleDrafts
from rlalign.testtime.errors import DecodeError, check_at_least
from rlalign.testtime.neighbourhoods import ManhattanBall
from rlalign.testtime.problem import Problem, UnitMap
from rlalign.testtime.rating import Rating
from rlalign.testtime.reflect import Reflector, ReflectResult

WAYPOINTS = UnitMap.even(NUM_WAYPOINTS, 2)


class DrivingDomain:
    """Scenes: `{"seed": 1000007}` or `{"scene": {...}}` as `Scene.to_json` writes it; or held-out
    scenes of its own. `drafts` > 1 goals lie at least 0.9 m apart, and the greedy plan is a draft
    too; 1 is the greedy plan alone."""

    OPTIONS: Mapping[str, Any] = {"oracle": "cv", "drafts": 3, "size": "full"}
    OWN: frozenset[str] = frozenset()

    def __init__(
        self,
        overrides: Sequence[str],
        progress: Progress | None,
        *,
        oracle: str,
        drafts: int,
        size: str,
    ) -> None:
        config = parse(ReflectConfig, {}, overrides)
        check_at_least(1, drafts=drafts)
        if oracle not in ("cv", "gt"):
            raise DecodeError(f"oracle={oracle!r}: choose cv or gt")
        self.oracle, self.seed = oracle, config.seed
        planner = load_planner(build_planner(0, size, progress=progress))
        self.planner, self.codebook = planner, planner.codebook
        goals = GoalDrafts(drafts, spacing=self.codebook.step_m)
        self.reflector = Reflector(
            planner,
            ManhattanBall(self.codebook.size, stride=3),
            drafts=SampleDrafts() if drafts == 1 else goals,
            completion=self._shift,
            config=config,
        )

    def make(self, index: int) -> Item:
        seed = FIRST_TEST_SEED * (1 + self.seed) + index
        return self._item(make_scene(seed), f"driving/{seed}")

    def read(self, row: Mapping[str, Any], name: str) -> Item:
        if isinstance(row.get("scene"), dict):
            scene: Scene | None = Scene.from_json(json.dumps(row["scene"]))
            if scene.expert_N2 is None:
                scene = with_expert(scene)
            if scene is None:
                raise TaskError("no drivable plan is known for this scene: leave it out")
        elif isinstance(row.get("seed"), int) and row["seed"] >= 0:
            scene = make_scene(row["seed"])
        else:
            raise TaskError('no scene: give {"seed": 1000007} or {"scene": {...}}')
        return self._item(scene, item_name(row, name))

    def describe(self, item: Item, ids_T: Tensor) -> list[list[float]]:
        """Waypoints (x forward, y left) in metres."""
        return self.codebook.decode(ids_T).round(3).tolist()

    def describe_unit(self, tokens: Sequence[int]) -> list[float]:
        """A waypoint in metres."""
        return self.codebook.decode(torch.tensor(tokens))[0].round(3).tolist()

    def measure(self, item: Item, ids_T: Tensor) -> dict[str, float]:
        """The PDM score under the real futures, and the mean distance to the expert's plan."""
        truth = DrivingVerifier(item.source, self.codebook, "gt").judge(ids_T[None])
        distance = expert_distance(self._states(item.source, ids_T)[None], item.source)
        return {"pdms_gt": float(truth.score_B[0]), "expert_distance_m": float(distance[0])}

    def picture(self, item: Item, result: ReflectResult) -> str:
        steps = [(result.draft_T, result.before, "draft")]
        for number, edit in enumerate(result.trace, 1):
            made = "unchanged"
            if edit.moved is not None and edit.moved_rating is not None:
                moved = (torch.tensor(edit.moved), edit.moved_rating, f"repair {number}: moved")
                steps.append(moved)
                made = "rewritten"
            steps.append((torch.tensor(edit.ids), edit.rating, f"repair {number}: {made}"))
        steps.append((result.ids_T, result.after, "result"))
        images = draw_plans(item.source, [self._view(item.source, *step) for step in steps])
        data = base64.b64encode(reflection_gif(images)).decode()
        return f'<img alt="draft, repairs and result" src="data:image/gif;base64,{data}">'

    def _item(self, scene: Scene, name: str) -> Item:
        verifier = DrivingVerifier(scene, self.codebook, self.oracle)
        problem = Problem(self.planner.blank_canvas([scene]), verifier, WAYPOINTS, name)
        return Item(problem, scene)

    def _shift(self, ids_CT: Tensor, before_T: Tensor, unit: int) -> Tensor:
        return self.codebook.shift(before_T, unit, ids_CT[:, list(WAYPOINTS.columns[unit])])

    def _states(self, scene: Scene, ids_T: Tensor) -> Any:
        return track(self.codebook.decode(ids_T)[None], scene.speed)[0]

    def _view(self, scene: Scene, ids_T: Tensor, rating: Rating, label: str) -> PlanView:
        unsafe_N = torch.tensor([n in rating.violated for n in range(NUM_WAYPOINTS)]).numpy()
        return PlanView(self._states(scene, ids_T), unsafe_N, f"{label} {rating.score:.2f}")
