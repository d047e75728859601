"""Properties of reward shaping."""

from __future__ import annotations

import math
import statistics

import torch

from rlalign import algos
from rlalign.verify.cases import worst
from rlalign.verify.table import shared

DAPO = "Yu et al. 2025, arXiv 2503.14476"


@shared("overlong punishment = the three pieces of the formula", source=DAPO, bound=1e-6)
def overlong_formula() -> float:
    errors = []
    for limit, buffer, factor in ((20480, 4096, 1.0), (64, 16, 0.5), (10, 10, 2.0), (9, 1, 1.0)):
        lengths = sorted({0, 1, limit - buffer, limit - buffer + 1, limit - 1, limit, limit + 5})
        ours = algos.overlong_penalty(torch.tensor(lengths), limit, buffer, factor).tolist()
        for length, penalty in zip(lengths, ours, strict=True):
            over = length - (limit - buffer)
            expected = 0.0 if over <= 0 else -factor * min(over / buffer, 1.0)
            errors.append(abs(penalty - expected))
    return worst(errors)


@shared(
    "overlong punishment: continuous, never increasing, within [-factor, 0]", source=DAPO, bound=0
)
def overlong_shape() -> float:
    limit, buffer, factor = 200, 64, 0.7
    penalty_B = algos.overlong_penalty(torch.arange(2 * limit), limit, buffer, factor).double()
    step_B = penalty_B[1:] - penalty_B[:-1]
    tolerance = 1e-6
    violations = [
        float(step_B.max()) - tolerance,
        float(-step_B.min()) - factor / buffer - tolerance,
        float(penalty_B.max()),
        -factor - float(penalty_B.min()) - tolerance,
        float(penalty_B[: limit - buffer + 1].abs().max()),
    ]
    return max(0.0, *violations)


@shared(
    "normalize_then_sum = float64 loops, absent and constant functions included",
    source="TRL, GRPOConfig.multi_objective_aggregation",
    bound=1e-6,
)
def normalize_then_sum() -> float:
    nan = math.nan
    group = [3, 8, 3, 8, 3, 8]
    functions = {
        "correct": [1.0, 0.0, 0.0, 1.0, 0.0, nan],
        "format": [0.1, 0.1, 0.2, 0.1, 0.15, nan],
        "style": [nan, 4.0, nan, 5.0, 9.0, nan],
    }
    weights = [1.0, 0.5, 2.0]
    ours = algos.normalize_then_sum(
        {name: torch.tensor(values) for name, values in functions.items()},
        weights,
        torch.tensor(group),
    ).tolist()
    errors = [float(not math.isnan(ours[5]))]
    for i in range(5):
        total = 0.0
        for values, weight in zip(functions.values(), weights, strict=True):
            peers = [v for v, g in zip(values, group, strict=True) if g == group[i] and v == v]
            if math.isnan(values[i]) or len(set(peers)) < 2:
                continue
            deviation = statistics.stdev(peers) + 1e-6
            total += weight * (values[i] - statistics.mean(peers)) / deviation
        errors.append(abs(ours[i] - total))
    return worst(errors)
