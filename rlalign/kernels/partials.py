"""Softmax statistics of parts of the vocabulary, and how they merge.

    of a part:  m = max z,  S = sum e^(z - m),  U = sum e^(z - m) (z - m),  c = z_target or 0
    merged:     M = max m_r,  a_r = e^(m_r - M),  S = sum a_r S_r,
                U = sum a_r (U_r + (m_r - M) S_r),  c = sum c_r

A part may be empty or all -inf: m = -inf and S = U = 0, which contributes nothing. The moment is
shifted by the maximum because lse - sum p z loses digits to cancellation at large logits.

Shapes: M rows, P parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Partials(NamedTuple):
    """Of one or several parts, each [M] or [P, M], in the accumulator's dtype."""

    max: Tensor
    sum: Tensor
    moment: Tensor
    chosen: Tensor


class Statistics(NamedTuple):
    """Of whole rows, each [M], nats: ln p of the target, entropy, logsumexp and mean logit."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    mean: Tensor


def merge(parts: Partials) -> Partials:
    """[P, M] to [M]; any order of the parts gives the same up to rounding."""
    top_M = parts.max.amax(0)
    base_M = top_M.masked_fill(top_M == -math.inf, 0)
    shift_PM = parts.max - base_M
    scale_PM = shift_PM.exp()
    # an empty part has shift -inf and sum 0: their product would be NaN
    moved_PM = torch.where(parts.max == -math.inf, 0, shift_PM * parts.sum)
    return Partials(
        max=top_M,
        sum=(scale_PM * parts.sum).sum(0),
        moment=(scale_PM * (parts.moment + moved_PM)).sum(0),
        chosen=parts.chosen.sum(0),
    )


def finish(whole: Partials, inside_M: Tensor) -> Statistics:
    """A row whose target is not `inside_M` the vocabulary is NaN, and so will be its gradient; one
    whose logits are all -inf has logp -inf and no entropy."""
    base_M = whole.max.masked_fill(whole.max == -math.inf, 0)
    log_sum_M = whole.sum.log()
    lse_M = torch.where(inside_M, base_M + log_sum_M, math.nan)
    empty_M = lse_M == -math.inf
    logp_M = torch.where(inside_M, (whole.chosen - base_M) - log_sum_M, math.nan)
    offset_M = torch.where(empty_M, 0, whole.moment / whole.sum)
    return Statistics(
        logp=torch.where(empty_M, lse_M, logp_M),
        entropy=torch.where(empty_M, 0, log_sum_M - offset_M),
        lse=lse_M,
        mean=base_M + offset_M,
    )
