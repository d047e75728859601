"""Which samples are accepted: what rejection sampling and allocators go by.

    threshold   correctness above `acceptance_threshold`
    top_k       the k samples of the group with the largest reward, the first of equals

Legend: B samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.segments import compact

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


def accepted(
    reward_B: Tensor, acc_B: Tensor, group_id_B: Tensor, valid_B: Tensor, cfg: AlgoConfig
) -> Tensor:
    """bool [B]. A sample outside `valid_B` (bool) is never accepted, nor, under `threshold`, one
    whose correctness is NaN."""
    if cfg.allocation.accept == "threshold":
        return valid_B & (acc_B > cfg.allocation.acceptance_threshold)
    index_B, num_groups = compact(group_id_B)
    rank_B = torch.full_like(index_B, len(index_B))
    for g in range(num_groups):
        members = ((index_B == g) & valid_B).nonzero()[:, 0]
        order = torch.argsort(reward_B[members], descending=True, stable=True)
        rank_B[members[order]] = torch.arange(len(members), device=rank_B.device)
    return rank_B < cfg.allocation.top_k
