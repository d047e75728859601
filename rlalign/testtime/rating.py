"""Verdicts as a search compares them.

    order = (hard, no unit violated, score, leading units that are fine, units that are fine)

is compared from left to right, higher is better. A sequence that is safe is thus preferred to one
of a higher score that is not, nothing makes up for a lower `hard`, and of sequences that are worth
nothing the one that fails last is kept.

Legend: B sequences, T tokens, U units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.tasks.verifier import Verdict
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.problem import Problem


@dataclass(frozen=True, slots=True)
class Rating:
    """What the verifier says of one sequence. `violated` are the units below the threshold."""

    hard: float
    score: float
    safe: tuple[float, ...]
    violated: tuple[int, ...]

    @property
    def is_safe(self) -> bool:
        return not self.violated

    @property
    def order(self) -> tuple[float, bool, float, int, int]:
        leading = self.violated[0] if self.violated else len(self.safe)
        return self.hard, self.is_safe, self.score, leading, -len(self.violated)


class Judge:
    """Asks the verifier, counts sequences (`calls`), and keeps the best seen so far.

    A number that is not finite counts as 0; `bad` counts the sequences that had one, and those that
    the verifier could not judge.
    """

    def __init__(self, problem: Problem, threshold: float) -> None:
        self.verifier, self.id, self.threshold = problem.verifier, problem.id, threshold
        self.calls = self.bad = 0
        self.best_T = problem.canvas.ids_BT[0]
        self.best = Rating(-math.inf, -math.inf, (), (0,))  # below anything that is judged

    def __call__(self, ids_BT: Tensor) -> list[Rating]:
        """Raises DecodeError where the verdict has the wrong shape; what the verifier itself
        raises goes through."""
        verdict = self.verifier.judge(ids_BT)
        self._check(verdict, len(ids_BT))
        table = torch.cat([verdict.hard_B[:, None], verdict.score_B[:, None], verdict.safe_BU], 1)
        table = table.detach().cpu().double()
        self.calls += len(ids_BT)
        self.bad += int((~table.isfinite()).any(1).sum()) + verdict.num_invalid
        rows = table.nan_to_num(0.0, 0.0, 0.0).tolist()
        ratings = [self._rating(hard, score, safe) for hard, score, *safe in rows]
        for ids_T, rating in zip(ids_BT, ratings, strict=True):
            if rating.order > self.best.order:
                self.best_T, self.best = ids_T.clone(), rating
        return ratings

    def _rating(self, hard: float, score: float, safe: list[float]) -> Rating:
        violated = [unit for unit, value in enumerate(safe) if value < self.threshold]
        return Rating(hard, score, tuple(safe), tuple(violated))

    def _check(self, verdict: Verdict, num: int) -> None:
        wanted = {"score_B": (num,), "safe_BU": (num, self.verifier.num_units), "hard_B": (num,)}
        for name, shape in wanted.items():
            got = tuple(getattr(verdict, name).shape)
            if got != shape:
                raise DecodeError(
                    f"problem {self.id!r}: the verifier's {name} has shape {list(got)} for {num} "
                    f"sequences, not {list(shape)}; mend its judge()"
                )
