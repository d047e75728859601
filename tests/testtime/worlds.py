"""Small models and verifiers whose every number is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlalign.models.masked_diffusion import Canvas
from rlalign.tasks.verifier import Verdict
from rlalign.testtime import Problem, UnitMap
from rlalign.testtime.drafts import Drafted

NAN = float("nan")


class HashModel:
    """Logits that are a chaotic function of the row and nothing else; counts its calls."""

    block_size = 0

    def __init__(self, vocab: int = 5, seed: int = 0) -> None:
        self.vocab_size, self.mask_id, self.seed = vocab, vocab - 1, seed
        self.batches: list[int] = []

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(len(canvas))
        rows = [self._row(row) for row in canvas.ids_BT.tolist()]
        return torch.stack(rows)[:, start:stop].float()

    def _row(self, row: list[int]) -> Tensor:
        rng = random.Random(f"{self.seed}/{row}")
        logits = [[rng.gauss(0, 1.5) for _ in range(self.vocab_size)] for _ in row]
        out = torch.tensor(logits, dtype=torch.float64)
        out[:, self.mask_id] = -torch.inf
        return out


class PairModel:
    """Two columns with the joint probabilities `joint_XY`: exact marginals and conditionals."""

    block_size = 0

    def __init__(self, joint_XY: Tensor) -> None:
        self.joint = joint_XY / joint_XY.sum()
        self.vocab_size, self.mask_id = len(joint_XY) + 1, len(joint_XY)
        self.batches: list[int] = []

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> Tensor:
        self.batches.append(len(canvas))
        out = []
        for x, y in canvas.ids_BT.tolist():
            first = self.joint.sum(1) if y == self.mask_id else self.joint[:, y]
            second = self.joint.sum(0) if x == self.mask_id else self.joint[x]
            row = torch.stack([first / first.sum(), second / second.sum()]).log()
            out.append(torch.nn.functional.pad(row, (0, 1), value=-torch.inf))
        return torch.stack(out)[:, start:stop].float()


class RouteModel:
    """Points of a scale around a route: deviations of what is visible fade out to both sides.

    The route comes as `cond["route"]` float64 [B, T]; every odd column follows the odd ones."""

    block_size = 0

    def __init__(self, num_values: int = 61, width: int = 2) -> None:
        self.vocab_size, self.mask_id, self.width = num_values + 1, num_values, width

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> Tensor:
        rows = []
        assert canvas.cond is not None
        for ids, route in zip(canvas.ids_BT.tolist(), canvas.cond["route"].tolist(), strict=True):
            means = [self._mean(ids, route, column) for column in range(len(ids))]
            value_TV = torch.arange(self.vocab_size) - torch.tensor(means)[:, None]
            logits_TV = -(value_TV**2) / 2
            logits_TV[:, self.mask_id] = -torch.inf
            rows.append(logits_TV)
        return torch.stack(rows)[:, start:stop].float()

    def _mean(self, ids: list[int], route: list[float], column: int) -> float:
        total = weight = 0.0
        for other in range(column % self.width, len(ids), self.width):
            if other != column and ids[other] != self.mask_id:
                near = 0.25 ** (abs(other - column) // self.width)
                total, weight = total + near * (ids[other] - route[other]), weight + near
        return route[column] + (total / max(weight, 0.25))


class RandomVerifier:
    """Verdicts that are a chaotic function of the row; a share of them holds a NaN."""

    def __init__(
        self, num_units: int, seed: int, safe_share: float, nan_share: float = 0.0
    ) -> None:
        self.num_units, self.seed = num_units, seed
        self.safe_share, self.nan_share = safe_share, nan_share

    def judge(self, ids_BT: Tensor) -> Verdict:
        rows = [self._row(row) for row in ids_BT.tolist()]
        score, safe, hard = zip(*rows, strict=True)
        return Verdict(torch.tensor(score), torch.tensor(safe), torch.tensor(hard))

    def _row(self, row: list[int]) -> tuple[float, list[float], float]:
        rng = random.Random(f"{self.seed}/{row}")
        score, hard = rng.random(), rng.choice([0.0, 0.5, 1.0])
        safe = [
            1.0 if rng.random() < self.safe_share else rng.choice([0.0, 0.25, 0.75])
            for _ in range(self.num_units)
        ]
        if rng.random() < self.nan_share:
            where = rng.randrange(3)
            score, hard = (NAN if where == 0 else score), (NAN if where == 1 else hard)
            safe[0] = NAN if where == 2 else safe[0]
        return score, safe, hard


class FunctionVerifier:
    """`judge_row(row) -> (score, safety of the units, hard)`."""

    def __init__(self, num_units: int, judge_row: Callable[[list[int]], tuple]) -> None:
        self.num_units, self.judge_row = num_units, judge_row
        self.seen: list[list[int]] = []

    def judge(self, ids_BT: Tensor) -> Verdict:
        self.seen += ids_BT.tolist()
        score, safe, hard = zip(*map(self.judge_row, ids_BT.tolist()), strict=True)
        kinds = (torch.tensor(list(part), dtype=torch.float64) for part in (score, safe, hard))
        return Verdict(*kinds)


class GivenDrafts:
    """Drafts that are there already."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        logp: Sequence[float] | None = None,
        goal: int | None = None,
    ) -> None:
        self.rows, self.logp, self.goal = rows, logp or [0.0] * len(rows), goal

    def draft(self, session):
        yield from ()
        return Drafted(torch.tensor(self.rows), torch.tensor(self.logp), self.goal)


def blank(num: int, mask_id: int, given: dict[int, int] | None = None) -> Canvas:
    ids_T = torch.full((num,), mask_id)
    for column, token in (given or {}).items():
        ids_T[column] = token
    return Canvas(ids_T[None])


def problem_of(canvas: Canvas, verifier, size: int = 1, name: str = "p") -> Problem:
    return Problem(canvas, verifier, UnitMap.even(verifier.num_units, size), name)
