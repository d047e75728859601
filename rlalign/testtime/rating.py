"""Verdicts as a search compares them.

    order = (hard, no unit violated, score, leading units that are fine, units that are fine)

is compared from left to right, higher is better. A sequence that is safe is thus preferred to one
of a higher score that is not, nothing makes up for a lower `hard`, and of sequences that are worth
nothing the one that fails last is kept. A verdict with a number that is not finite is the worst
there is: score -inf, hard 0, every unit's safety 0.

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

ROUNDING = 1e-6  # beyond a range that is forgiven


@dataclass(frozen=True, slots=True)
class Rating:
    """What the verifier says of one sequence. `violated` are the units below the threshold; a
    `score` of -inf says that a number was missing."""

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
        hard = self.hard if self.score > -math.inf else -math.inf
        return hard, self.is_safe, self.score, leading, -len(self.violated)


class Judge:
    """Asks the verifier, counts sequences (`calls`), and keeps the best seen so far.

    `bad` counts the sequences with a number that was not finite, and those that the verifier could
    not judge.
    """

    def __init__(self, problem: Problem, threshold: float) -> None:
        self.verifier, self.id, self.threshold = problem.verifier, problem.id, threshold
        self.calls = self.bad = 0
        self.best_T = problem.canvas.ids_BT[0]
        # one violated unit more than any verdict: below all that is judged
        self.best = Rating(0.0, -math.inf, (), tuple(range(self.verifier.num_units + 1)))

    def __call__(self, ids_BT: Tensor) -> list[Rating]:
        """Raises DecodeError where the verdict has the wrong shape or range; what the verifier
        itself raises goes through."""
        verdict = self.verifier.judge(ids_BT.clone())
        self._check(verdict, len(ids_BT))
        table = torch.cat([verdict.hard_B[:, None], verdict.score_B[:, None], verdict.safe_BU], 1)
        table = table.detach().cpu().double()
        self._check_range(table)
        self.calls += len(ids_BT)
        ratings = [self._rating(*row) for row in table.tolist()]
        self.bad += sum(rating.score == -math.inf for rating in ratings) + verdict.num_invalid
        for ids_T, rating in zip(ids_BT, ratings, strict=True):
            if rating.order > self.best.order:
                self.best_T, self.best = ids_T.clone(), rating
        return ratings

    def _rating(self, hard: float, score: float, *safe: float) -> Rating:
        if not all(map(math.isfinite, (hard, score, *safe))):
            hard, score, safe = 0.0, -math.inf, (0.0,) * len(safe)
        violated = [unit for unit, value in enumerate(safe) if value < self.threshold]
        return Rating(hard, score, safe, tuple(violated))

    def _check(self, verdict: Verdict, num: int) -> None:
        wanted = {"score_B": (num,), "safe_BU": (num, self.verifier.num_units), "hard_B": (num,)}
        for name, shape in wanted.items():
            value = getattr(verdict, name)
            if not isinstance(value, Tensor):
                raise DecodeError(
                    f"problem {self.id!r}: the verifier's {name} is {type(value).__name__}, not a "
                    "tensor; mend its judge()"
                )
            got = tuple(value.shape)
            if got != shape:
                raise DecodeError(
                    f"problem {self.id!r}: the verifier's {name} has shape {list(got)} for {num} "
                    f"sequences, not {list(shape)}; mend its judge()"
                )

    def _check_range(self, table: Tensor) -> None:
        """Of what is finite; the columns are hard, score, and the safety of each unit."""
        hard, safe = table[:, 0].nan_to_num(0.0, 0.0, 0.0), table[:, 2:].nan_to_num(0.0, 0.0, 0.0)
        wrong = {
            "hard_B above 1": hard > 1 + ROUNDING,
            "safe_BU outside [0, 1]": (safe < -ROUNDING) | (safe > 1 + ROUNDING),
        }
        for what, where in wrong.items():
            if bool(where.any()):
                raise DecodeError(
                    f"problem {self.id!r}: the verifier gave a {what}; scale what its judge() gives"
                )
