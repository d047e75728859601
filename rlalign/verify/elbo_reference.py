"""The losses of diffusion language models in plain float64 loops, written from the formulas of
their papers and sharing nothing with rlalign/algos.

A completion is a list of passes; a pass maps a token's place to (weight, log-prob now, old,
reference): `Completion.passes[j][t]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Cell = tuple[float, float, float, float]  # weight, log-probs: now, old, reference


@dataclass(frozen=True, slots=True)
class Completion:
    """`share` of the loss, summed over its tokens; `length` are its tokens that are scored."""

    passes: Sequence[Mapping[int, Cell]]
    advantage: float
    share: float
    length: int
    group: int
    reward: float


def estimate(completion: Completion, which: int) -> float:
    """Of the log-prob by the policy of now (1), the old one (2) or the reference (3)."""
    return sum(cell[0] * cell[which] for cells in completion.passes for cell in cells.values())


def changes(completion: Completion, divisor: float) -> list[float]:
    """d_j of every pass."""
    n = len(completion.passes)
    return [
        sum(n * cell[0] * (cell[1] - cell[2]) for cell in cells.values()) / divisor
        for cells in completion.passes
    ]


def clipped(ratio: float, advantage: float, clip: tuple[float, float] | None) -> float:
    """min(r A, clip(r) A)."""
    if clip is None:
        return ratio * advantage
    inside = min(max(ratio, 1 - clip[0]), 1 + clip[1])
    return min(ratio * advantage, inside * advantage)


def objective(
    d: Sequence[float], advantage: float, clip: tuple[float, float] | None = None
) -> float:
    """R of one completion."""
    return clipped(math.exp(sum(d) / len(d)), advantage, clip)


def bound(
    d: Sequence[float],
    advantage: float,
    clip: tuple[float, float] | None = None,
    *,
    quadratic: bool = False,
) -> float:
    """The lower bound of R that is a mean over passes."""
    total = 0.0
    for change in d:
        if advantage >= 0:
            ratio = 1 + change
        elif quadratic and change <= 1:
            ratio = 1 + change + (math.e - 2) * change * change
        else:
            ratio = math.exp(change)
        total += clipped(ratio, advantage, clip) / len(d)
    return total


def bgpo(batch: Sequence[Completion], clip: tuple[float, float], canvas: int) -> float:
    """The exact objective over the tokens that are scored, clipped; no KL."""
    return -sum(c.share * objective(changes(c, c.length), c.advantage, clip) for c in batch)


def espo(batch: Sequence[Completion], clip: tuple[float, float], canvas: int, beta: float) -> float:
    total = 0.0
    for c in batch:
        gap = estimate(c, 1) - estimate(c, 3)
        total -= c.share * objective(changes(c, canvas), c.advantage, clip)
        total += c.share * beta * gap * gap / (2 * canvas)
    return total


def spg(batch: Sequence[Completion], power: float, share: float) -> float:
    total = 0.0
    for c in batch:
        low = sum(sum(cell[1] for cell in cells.values()) / len(cells) for cells in c.passes) / len(
            c.passes
        )
        value = low
        if c.advantage < 0:
            value = share * upper(c, power) + (1 - share) * low
        total -= c.share * c.advantage * value
    return total


def upper(completion: Completion, power: float) -> float:
    """SPG's upper bound per token."""
    masked: dict[int, float] = {}
    for cells in completion.passes:
        time = len(cells) / completion.length
        for token, cell in cells.items():
            inside = math.exp(power * cell[1]) / time / len(completion.passes)
            masked[token] = masked.get(token, 0.0) + inside
    return sum(math.log(value) for value in masked.values()) / power / len(masked)


def vrpo(batch: Sequence[Completion], beta: float) -> float:
    """Mean over the pairs of each group, and over the groups."""
    groups = sorted({c.group for c in batch})
    total = 0.0
    for group in groups:
        members = [c for c in batch if c.group == group]
        pairs = [(a, b) for a in members for b in members if a.reward > b.reward]
        for a, b in pairs:
            gaps = [estimate(c, 1) - estimate(c, 3) for c in (a, b)]
            margin = beta * (gaps[0] - gaps[1])
            total += math.log1p(math.exp(-margin)) / len(pairs) / len(groups)
    return total


def order_mean(table: Mapping[tuple[bool, ...], Sequence[float]]) -> float:
    """Mean over all orders of the log-prob of writing the tokens in that order; `table` holds the
    log-prob of each token under each mask."""
    length = len(next(iter(table)))
    orders = list(itertools.permutations(range(length)))
    total = 0.0
    for order in orders:
        left = [True] * length
        for token in order:
            total += table[tuple(left)][token]
            left[token] = False
    return total / len(orders)


def wd1(reward: Sequence[float], group: Sequence[int]) -> list[float]:
    """n (w+ - w-) of every completion; 0 for a reward that is not finite."""
    found = []
    for own, label in zip(reward, group, strict=True):
        if not math.isfinite(own):
            found.append(0.0)
            continue
        others = [r for r, g in zip(reward, group, strict=True) if g == label and math.isfinite(r)]
        up = math.exp(own) / sum(map(math.exp, others))
        down = math.exp(-own) / sum(math.exp(-r) for r in others)
        found.append(len(others) * (up - down))
    return found
