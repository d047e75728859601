"""Shares to whole numbers: how many samples each of m prompts gets of a budget of N.

    n_i = N w_i / sum w      minimises sum_i w_i^2 / n_i, the variance of a mean whose part i has
                             variance w_i^2 / n_i (Neyman 1934)

with bounds lo <= n_i <= hi: n_i = clip(lambda w_i, lo, hi), lambda such that they add up to N. Then
whole numbers that add up to N exactly:

    largest_remainder   round down; one more for the largest remainders, the first of equals
    low_accept_first    round down; one more for the lowest accept rates (GVM's text)
    optimal             the minimum of sum w_i^2 / n_i over whole numbers: one by one to where it
                        falls most

Legend: m prompts, float64 on the CPU.
"""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError

ROUNDINGS = ("largest_remainder", "low_accept_first", "optimal")
BISECTIONS = 200  # a float64 has no more digits than that


def allocate(
    weight_m: Tensor,
    budget: int,
    rounding: str = "largest_remainder",
    *,
    low: int = 0,
    high: int | None = None,
    unit: int = 1,
    accept_rate_m: Tensor | None = None,
) -> Tensor:
    """Samples of each prompt, int64 [m], multiples of `unit` that add up to `budget` less its
    remainder by `unit`, exactly.

    weight_m: >= 0; NaN and infinite count as 0. A prompt of weight 0 gets `low`. low, high: bounds
    of each prompt. accept_rate_m: for low_accept_first. Raises AlgoError where all weights are 0,
    or the bounds cannot be kept.
    """
    weight_m = torch.where(weight_m.isfinite(), weight_m.double(), 0.0)
    units, least = budget // unit, math.ceil(low / unit)
    most = units if high is None else high // unit
    if rounding not in ROUNDINGS:
        raise AlgoError(f"rounding {rounding!r} is none of {', '.join(ROUNDINGS)}")
    if not len(weight_m) or units == 0:
        return torch.zeros(len(weight_m), dtype=torch.long)
    positive = int((weight_m > 0).sum())
    if not positive:
        raise AlgoError(f"all {len(weight_m)} weights are 0: there is nothing to allocate by")
    _check_bounds(units, least, most, len(weight_m), positive, unit)
    if rounding == "optimal":
        return unit * _optimal(weight_m, units, least, most)
    exact_m = _bounded(weight_m, units, least, most)
    if rounding == "low_accept_first":
        if accept_rate_m is None:
            raise AlgoError("rounding=low_accept_first needs the accept rates")
        return unit * _one_more(exact_m, -accept_rate_m.double(), weight_m, units, most)
    return unit * _one_more(exact_m, exact_m - _floor(exact_m), weight_m, units, most)


def variance_ratio(weight_m: Tensor) -> float:
    """Variance under equal shares over that under shares by weight: m sum w^2 / (sum w)^2 >= 1, and
    1 only where all weights are equal; NaN where all are 0."""
    weight_m = weight_m.double()
    return float(len(weight_m) * (weight_m**2).sum() / weight_m.sum() ** 2)


def _check_bounds(
    units: int, least: int, most: int, prompts: int, positive: int, unit: int
) -> None:
    room = positive * most + (prompts - positive) * least
    if least <= most and prompts * least <= units <= room:
        return
    raise AlgoError(
        f"{units * unit} samples cannot be given to {prompts} prompts, {positive} of them with a "
        f"weight, at {least * unit} to {most * unit} each (in units of {unit}): between "
        f"{prompts * least * unit} and {room * unit} can. Change algo.allocation.budget_per_prompt,"
        " min_samples, max_samples or group_size"
    )


def _bounded(weight_m: Tensor, units: int, least: int, most: int) -> Tensor:
    """clip(lambda w, least, most) that adds up to `units`; lambda by bisection."""
    plain_m = units * weight_m / weight_m.sum()
    if bool(((plain_m >= least) & (plain_m <= most)).all()):
        return plain_m
    low, high = 0.0, units / float(weight_m[weight_m > 0].min())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = float((middle * weight_m).clamp(least, most).sum()) >= units
        low, high = (low, middle) if enough else (middle, high)
    return (high * weight_m).clamp(least, most)


def _floor(exact_m: Tensor) -> Tensor:
    """Down to whole numbers; what rounding left just below one is that one."""
    return (exact_m + 1e-9 * exact_m.clamp(min=1)).floor()


def _one_more(exact_m: Tensor, order_m: Tensor, weight_m: Tensor, units: int, most: int) -> Tensor:
    """Rounded down, and one more for the first by falling `order_m` until they add up."""
    count_m = _floor(exact_m).long()
    missing = units - int(count_m.sum())
    may_m = (weight_m > 0) & (count_m < most)
    ranked = torch.argsort(order_m.where(may_m, -math.inf), descending=True, stable=True)
    count_m[ranked[:missing]] += 1
    return count_m


def _optimal(weight_m: Tensor, units: int, least: int, most: int) -> Tensor:
    """One more where w^2 / (n (n + 1)), by which the sum falls, is largest. All steps that gain
    more than some threshold at once, as many as there is room for; the rest one by one."""
    square_m = weight_m**2

    def taken(threshold: float) -> Tensor:
        steps_m = ((1 + 4 * square_m / threshold).sqrt() - 1) / 2
        count_m = torch.where(weight_m > 0, 1 + steps_m.clamp(max=units).floor(), 0.0)
        return count_m.clamp(least, most).long()

    low, high = 0.0, float(square_m.max())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        fits = int(taken(middle).sum()) <= units
        low, high = (low, middle) if fits else (middle, high)
    count_m = taken(high)
    if int(count_m.sum()) > units:  # fewer samples than prompts with a weight
        count_m = torch.full_like(count_m, least)

    return _one_by_one(square_m.tolist(), count_m.tolist(), units, most)


def _one_by_one(square: list[float], count: list[int], units: int, most: int) -> Tensor:
    def entry(i: int) -> tuple[float, float, int]:
        n = count[i]
        return (-square[i] / (n * (n + 1)) if n else -math.inf), -square[i], i

    heap = [entry(i) for i, s in enumerate(square) if s > 0 and count[i] < most]
    heapq.heapify(heap)
    for _ in range(units - sum(count)):
        i = heapq.heappop(heap)[2]
        count[i] += 1
        if count[i] < most:
            heapq.heappush(heap, entry(i))
    return torch.tensor(count)
