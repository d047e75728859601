"""What happens to rewards and masks before credit is given.

Soft overlong punishment (DAPO, arXiv 2503.14476), with L the completion length including
the end-of-sequence token, M the limit and C the buffer: 0 for L <= M - C, -(L - (M - C)) / C *
factor up to M, -factor above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import compact, group_stats, segment_sum

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


def overlong_penalty(
    length_B: Tensor, max_completion_length: int, buffer_len: int, factor: float
) -> Tensor:
    """What to add to the reward of a completion of `length_B` tokens: float32 in [-factor, 0].

    buffer_len 0 switches it off. Raises AlgoError when the buffer is longer than the limit.
    """
    if not 0 <= buffer_len <= max_completion_length:
        raise AlgoError(
            f"algo.overlong.buffer_len={buffer_len} must lie in [0, max_completion_length="
            f"{max_completion_length}]; DAPO uses a fifth of the limit"
        )
    if buffer_len == 0:
        return torch.zeros(length_B.shape, dtype=torch.float32, device=length_B.device)
    over_B = (length_B.double() - (max_completion_length - buffer_len)) / buffer_len
    # 0.0 - x instead of -x: lengths below the buffer give 0, not -0.
    return (0.0 - over_B.clamp(0, 1) * factor).float()


def gradient_mask(
    mask_BT: Tensor, reward_B: Tensor, truncated_B: Tensor, cfg: AlgoConfig
) -> Tensor:
    """`mask_BT` without the rows that must not train: unscorable ones (NaN or inf reward), and
    truncated ones when `mask_truncated_completions`, or under RAFT, which counts them as rejected.
    Truncated means finish reason "length", not "the last token is not end-of-sequence"; such rows
    keep their reward in the statistics."""
    keep_B = reward_B.isfinite()
    if cfg.overlong.mask_truncated_completions or cfg.adv_estimator == "raft":
        keep_B = keep_B & ~truncated_B.bool()
    return mask_BT * keep_B[:, None].to(mask_BT.dtype)


def normalize_then_sum(
    by_function: Mapping[str, Tensor],
    weights: Sequence[float],
    group_id_B: Tensor,
    *,
    adv_eps: float = 1e-6,
    tie_tol: float = 1e-8,
) -> Tensor:
    """Reward as the weighted sum of each function's group-normalised values: float32 [B].

    weights: one per function, in the order of `by_function`. A function that varies only a little
    then counts as much as one that varies a lot. NaN or inf means the function does not apply: it
    enters no statistic and adds nothing; a sample to which none applies is NaN. A function that is
    constant within a group adds exactly 0 there.
    """
    total_B = torch.zeros(group_id_B.shape, dtype=torch.float64, device=group_id_B.device)
    applied_B = torch.zeros_like(total_B, dtype=torch.bool)
    for value_B, weight in zip(by_function.values(), weights, strict=True):
        valid_B = value_B.isfinite()
        value64_B = torch.where(valid_B, value_B.double(), 0.0)
        stats = group_stats(value64_B, group_id_B, valid_B, tie_tol)
        scaled_B = (value64_B - stats.mean_B) / (stats.std_B + adv_eps)
        total_B += torch.where(valid_B & ~stats.tied_B, weight * scaled_B, 0.0)
        applied_B |= valid_B
    return torch.where(applied_B, total_B, float("nan")).float()


def reward_metrics(
    reward_B: Tensor, group_id_B: Tensor, cfg: AlgoConfig
) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """`reward` (mean over scorable samples), `reward_std` (mean over groups of two or more) and
    `frac_reward_zero_std` (share of those groups whose rewards are all equal), additive."""
    valid_B = reward_B.isfinite()
    reward64_B = torch.where(valid_B, reward_B.double(), 0.0)
    stats = group_stats(reward64_B, group_id_B, valid_B, cfg.reward_tie_tol)
    index_B, num_groups = compact(group_id_B)
    size_B = segment_sum(torch.ones_like(reward64_B), index_B, num_groups)[index_B]
    share_B = (stats.count_B >= 2) / size_B  # adds up to 1 over a group
    num_comparable = share_B.sum()
    return {
        "reward": (reward64_B.sum(), valid_B.sum().double()),
        "reward_std": ((stats.std_B * share_B).sum(), num_comparable),
        "frac_reward_zero_std": ((stats.tied_B * share_B).sum(), num_comparable),
    }
