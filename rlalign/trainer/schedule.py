"""The learning rate of each optimizer step: a pure function of the step.

With peak rate eta, W warm-up steps and N steps in all, for step s = 0 .. N-1:

    s <  W:  eta * (s + 1) / W
    s >= W:  eta * f(p),  p = (s - W) / max(1, N - W)
             constant: f = 1;  linear: f = 1 - p;  cosine: f = (1 + cos(pi p)) / 2

so the first step already moves the weights and the last one still does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlalign.config.schema import OptimConfig


def lr_schedule(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `max_steps`.

    Steps past `max_steps` keep the rate of the end of the schedule. Raises ValueError for a
    negative step or an unknown schedule.
    """
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    peak, warmup = optim.learning_rate, optim.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "linear":
        return peak * (1.0 - progress)
    if optim.schedule == "cosine":
        return peak * (1.0 + math.cos(math.pi * progress)) / 2.0
    raise ValueError(f"unknown schedule {optim.schedule!r}: constant, linear or cosine")
