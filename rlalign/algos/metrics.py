"""Metrics of a loss that can be added up over micro-batches and processes.

A value is a pair (sum, weight), whose mean is sum / weight after adding both, or, for names ending
in /max or /min, a plain number that is combined by max or min.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Metrics = Mapping[str, Tensor | tuple[Tensor, Tensor]]

RATIO = "sampling/importance_sampling_ratio"


def merge_metrics(parts: Iterable[Metrics]) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """Combine the metrics of several micro-batches into those of their union."""
    merged: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            before = merged.get(name)
            merged[name] = value if before is None else _combine(name, before, value)
    return merged


def finalize_metrics(metrics: Metrics) -> dict[str, float]:
    """Plain numbers to log: sum / weight (names without any weight are left out), and the
    effective sample size of the importance weights as `sampling/ess`, a share in (0, 1]."""
    final: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            final[name] = float(value)
        elif float(value[1]) > 0:
            final[name] = float(value[0]) / float(value[1])
    mean, mean_square = final.get(f"{RATIO}/mean"), final.pop(f"{RATIO}/mean_square", None)
    if mean is not None and mean_square:
        final["sampling/ess"] = mean**2 / mean_square
    return final


def _combine(
    name: str, one: Tensor | tuple[Tensor, Tensor], other: Tensor | tuple[Tensor, Tensor]
) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[0] + other[0], one[1] + other[1]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if name.endswith("/max"):
            return torch.maximum(one, other)
        if name.endswith("/min"):
            return torch.minimum(one, other)
    raise TypeError(f"metric {name!r} is neither a (sum, weight) pair nor named */max or */min")
