"""Reductions over groups of samples, keyed on a group id.

Groups may be ragged, interleaved and carry any labels: nothing here looks at order or size, so an
algorithm that allocates samples unevenly needs no second code path.

Legend: B samples, G distinct groups. `_B` results are broadcast back to the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Statistics of a sample's own group, one entry per sample.

    `count_B` usable members; `mean_B`; `std_B` with ddof=1 (0 below two members); `tied_B`: all
    usable members are equal within the tolerance (true for groups of one or none).
    """

    count_B: Tensor
    mean_B: Tensor
    std_B: Tensor
    tied_B: Tensor


def compact(group_id_B: Tensor) -> tuple[Tensor, int]:
    """Relabel groups 0 .. G-1; returns (index_B int64, G)."""
    label_G, index_B = torch.unique(group_id_B, return_inverse=True)
    return index_B, label_G.numel()


def segment_sum(value_B: Tensor, index_B: Tensor, num_groups: int) -> Tensor:
    """Sum of `value_B` per group: [G]."""
    return value_B.new_zeros(num_groups).index_add(0, index_B, value_B)


def same_group_pairs(index_B: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of rows i < j of one group: their row numbers, two int64 tensors of one length.

    Takes B^2 bytes in between.
    """
    same_BB = index_B[:, None] == index_B
    first, second = torch.triu(same_BB, diagonal=1).nonzero(as_tuple=True)
    return first, second


def is_tied(low: Tensor, high: Tensor, tie_tol: float) -> Tensor:
    """Whether a spread is zero up to `tie_tol` relative to the larger magnitude.

    A spread test instead of `std == 0`: twelve float32 copies of 0.98 have a rounded mean that
    differs from each of them, and dividing by that "std" invents advantages of 0.15 to 0.95.
    """
    return (high - low) <= tie_tol * torch.maximum(high.abs(), low.abs())


def group_stats(value_B: Tensor, group_id_B: Tensor, valid_B: Tensor, tie_tol: float) -> GroupStats:
    """Mean, standard deviation and tie flag of each sample's group over its valid members.

    `value_B` must be finite where `valid_B` (bool) holds and may be anything elsewhere.
    """
    index_B, num_groups = compact(group_id_B)
    usable_B = torch.where(valid_B, value_B, torch.zeros_like(value_B))
    count_G = segment_sum(valid_B.to(value_B.dtype), index_B, num_groups)
    mean_G = segment_sum(usable_B, index_B, num_groups) / count_G.clamp(min=1)
    centred_B = torch.where(valid_B, usable_B - mean_G[index_B], torch.zeros_like(value_B))
    variance_G = segment_sum(centred_B**2, index_B, num_groups) / (count_G - 1).clamp(min=1)
    low_G = segment_extreme(value_B, valid_B, index_B, num_groups, "amin")
    high_G = segment_extreme(value_B, valid_B, index_B, num_groups, "amax")
    tied_G = is_tied(low_G, high_G, tie_tol) | (count_G < 2)
    return GroupStats(
        count_G[index_B], mean_G[index_B], variance_G.sqrt()[index_B], tied_G[index_B]
    )


def segment_extreme(
    value_B: Tensor, valid_B: Tensor, index_B: Tensor, num_groups: int, reduce: str
) -> Tensor:
    """The smallest (amin) or largest (amax) valid value per group, 0 where there is none: [G]."""
    extreme_G = value_B.new_zeros(num_groups)
    return extreme_G.scatter_reduce(
        0, index_B[valid_B], value_B[valid_B], reduce, include_self=False
    )
