"""How far an expert may move a larger model at one step of decoding (dynamic logit fusion, Fan et
al., https://arxiv.org/abs/2406.15480).

    P = softmax M (large),  Q = softmax S (small base),  Q_t = softmax S_t (expert t)
    D_t = log Q_t - log Q,  P_a = softmax(M + sum_t a_t D_t)
    L(a) = sum_t (KL(P_a || P) - KL(Q_t || Q))^2 + (KL(P || P_a) - KL(Q || Q_t))^2

The strength a is the one at which the large model moves, in KL, as far as the expert did. With
k(a) = log E_P[e^(aD)] no softmax over the vocabulary is written down:

    KL(P_a || P) = a k'(a) - k(a),  KL(P || P_a) = k(a) - a k'(0),  k'(a) = E_{P_a}[D]

Both grow with a >= 0, so the minimum lies between the strengths at which either meets its target;
L may have several minima in there, and is taken at every point of the grid between them. Of several
experts one acts (a is zero elsewhere) or, with `joint`, two; then L = T |moved - mean target|^2 +
the targets' spread, which the choice does not depend on.

Shapes: B rows, V vocabulary, T experts, N strengths of the grid, K rows that are looked at; a
leading 2 is the way of a divergence: forward KL(moved || base), backward KL(base || moved).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 2**18  # of a temporary: it and what it comes from stay in a core's cache
SMALLEST, LARGEST = 1e-20, 1e30  # sums of exponentials that lose nothing, in single precision too
ROUNDING = 16  # a divergence below so many epsilons of the logits is none
STILL = 4  # epsilons of what a tilt's divergence is the difference of; 1.6 were seen
FIRST_GUESS = 1.0  # the strength at which a large model that is the small one moves as the expert


class Move(NamedTuple):
    """An expert beside its base: their log-ratio, and how far it moved both ways, in nats.
    `bounded_B` counts the tokens that one of the two rules out and the other does not."""

    delta_BV: Tensor
    moved_2B: Tensor
    bounded_B: Tensor


class Choice(NamedTuple):
    """Strengths, at most one of a row above zero (two if joint), and L there. `finite_B`: whether
    the row's logits can be used at all; its strengths are zero if not."""

    alpha_BT: Tensor
    loss_B: Tensor
    finite_B: Tensor


def measure(small_BV: Tensor, expert_BV: Tensor, bound: float) -> Move:
    """The move from the small base's logits to the expert's, in the dtype of the logits.

    A token that both rule out (-inf) did not move; one that one of them does is taken to be
    e^bound less likely there than in the other. A row with NaN or +inf, or without any token, has
    NaN for its divergences.
    """
    delta_BV = torch.empty_like(small_BV)
    total_2B, moment_2B = _measure(small_BV, expert_BV, delta_BV)
    moved_2B = _beyond_rounding(_two_ways(moment_2B / total_2B), total_2B.log())
    bounded_B = torch.zeros(len(small_BV), dtype=torch.long, device=small_BV.device)
    odd = (_unsafe(total_2B) | ~moved_2B.isfinite()).any(0).nonzero()[:, 0]
    if len(odd):
        delta_BV[odd], moved_2B[:, odd], bounded_B[odd] = _bounded(
            small_BV[odd], expert_BV[odd], bound
        )
    return Move(delta_BV, moved_2B, bounded_B)


def search(
    large_BV: Tensor,
    moves: Sequence[Move],
    strengths: Sequence[float],
    *,
    joint: bool = False,
    backend: str = "auto",
) -> Choice:
    """The first minimiser of L in scan order: expert by expert and `strengths` (ascending, at
    least 0) in order; of `joint` the pairs in order, the last expert's changing fastest.

    Nothing is remembered from one call to the next. Experts that did not move leave the large model
    at the first strength. `backend`: "torch" looks at the strengths within the bracket, "triton" at
    all of them in one pass (single precision, one expert acting); "auto" is the latter on a GPU.
    """
    targets_T2B = torch.stack([move.moved_2B for move in moves])
    finite_B = large_BV.amax(-1).isfinite() & targets_T2B.isfinite().all(0).all(0)
    target_2B = targets_T2B.mean(0)
    spread_B = (targets_T2B - target_2B).square().sum((0, 1))
    moving = (finite_B & (target_2B > 0).any(0)).nonzero()[:, 0]
    alpha_BT = large_BV.new_zeros(len(large_BV), len(moves))
    alpha_BT[finite_B, 0] = strengths[0]
    loss_B = torch.zeros_like(spread_B)
    if backend == "auto":
        backend = "triton" if large_BV.is_cuda and large_BV.dtype == torch.float32 else "torch"
    scan = _scan_pairs if joint else _scan_experts
    if len(moving):
        large, deltas = _take(large_BV, moving), [_take(m.delta_BV, moving) for m in moves]
        alpha_BT[moving], loss_B[moving] = scan(
            large, deltas, target_2B[:, moving], strengths, backend
        )
    return Choice(alpha_BT, len(moves) * loss_B + spread_B, finite_B)


def fuse(large_BV: Tensor, moves: Sequence[Move], alpha_BT: Tensor) -> Tensor:
    """The logits of P_a, [B, V]. A token that the large model rules out stays out."""
    fused_BV = large_BV
    for move, alpha_B in zip(moves, alpha_BT.unbind(-1), strict=True):
        fused_BV = torch.addcmul(fused_BV, move.delta_BV, alpha_B[:, None])
    return fused_BV


def divergences(large_BV: Tensor, delta_BV: Tensor, alpha_B: Tensor) -> Tensor:
    """KL(P_a || P) and KL(P || P_a) along a direction, [2, B]."""
    start_2B, moved_2B = tilt(
        large_BV, delta_BV, torch.stack([torch.zeros_like(alpha_B), alpha_B], -1)
    ).unbind(-1)
    return _divergences(start_2B, moved_2B, alpha_B)


def tilt(
    large_BV: Tensor, delta_BV: Tensor, alpha_KC: Tensor, rows_K: Tensor | None = None
) -> Tensor:
    """log sum_v e^(M + aD), which is k(a) and a constant, and k'(a), of rows `rows_K` (ascending;
    None: all) at C strengths each, [2, K, C]. Reading the rows costs more than a strength does."""
    alpha_CK = alpha_KC.T.contiguous()
    sums_2CK = large_BV.new_empty(2, *alpha_CK.shape)
    size = min(_block_size(large_BV), max(1, len(alpha_KC)))
    if rows_K is not None and len(rows_K) == len(large_BV):
        rows_K = None
    work = large_BV.new_empty(1 if rows_K is None else 3, size, large_BV.shape[-1])
    for at in range(0, len(alpha_KC), size):
        block = slice(at, at + size)
        x, *copies = work[:, : len(alpha_KC) - at]
        if rows_K is None:
            large, delta = large_BV[block], delta_BV[block]
        else:
            large, delta = copies
            torch.index_select(large_BV, 0, rows_K[block], out=large)
            torch.index_select(delta_BV, 0, rows_K[block], out=delta)
        for column, alpha_K in enumerate(alpha_CK):
            torch.addcmul(large, delta, alpha_K[block, None], out=x).exp_()
            torch.sum(x, -1, out=sums_2CK[0, column, block])
            torch.sum(x.mul_(delta), -1, out=sums_2CK[1, column, block])
    total_CK, moment_CK = sums_2CK
    out_2CK = torch.stack([total_CK.log(), moment_CK / total_CK])
    column, row = _unsafe(total_CK).nonzero(as_tuple=True)
    if len(row):
        at = row if rows_K is None else rows_K[row]
        out_2CK[:, column, row] = _safe_tilt(large_BV[at], delta_BV[at], alpha_CK[column, row])
    return out_2CK.mT


def _safe_tilt(large_KV: Tensor, delta_KV: Tensor, alpha_K: Tensor) -> Tensor:
    """`tilt` of every row at its strength, [2, K], whatever the size of the logits."""
    x_KV = torch.addcmul(large_KV, delta_KV, alpha_K[:, None])
    weight_KV = x_KV.softmax(-1)
    return torch.stack([x_KV.logsumexp(-1), weight_KV.mul_(delta_KV).sum(-1)])


def _unsafe(total: Tensor) -> Tensor:
    """Whether exponentials that were summed may have lost something, or are not numbers. Most rows
    are safe, and to look for their largest logit first would take a pass over them."""
    return ~((total > SMALLEST) & (total < LARGEST))


def _measure(small_BV: Tensor, expert_BV: Tensor, delta_BV: Tensor) -> Tensor:
    """Writes the log-ratio D into `delta_BV`; the sums of e^logit and of D e^logit [2, 2, B], each
    of the expert and of its base."""
    sums_22B = small_BV.new_empty(2, 2, len(small_BV))
    size = min(_block_size(small_BV), max(1, len(small_BV)))
    work_2RV = small_BV.new_empty(2, size, small_BV.shape[-1])
    for at in range(0, len(small_BV), size):
        block = slice(at, at + size)
        small, expert, delta = small_BV[block], expert_BV[block], delta_BV[block]
        weights = work_2RV[:, : len(small)]
        torch.exp(expert, out=weights[0])
        torch.exp(small, out=weights[1])
        total_2R = torch.sum(weights, -1, out=sums_22B[0, :, block])
        shift_R = (total_2R[0] / total_2R[1]).log_()
        torch.sub(expert, small, out=delta).sub_(shift_R[:, None])
        torch.sum(weights.mul_(delta), -1, out=sums_22B[1, :, block])
    return sums_22B


def _two_ways(mean_2B: Tensor) -> Tensor:
    """The divergences, from the means of D under the expert and under its base."""
    return torch.stack([mean_2B[0], -mean_2B[1]])


def _bounded(small_BV: Tensor, expert_BV: Tensor, bound: float) -> Move:
    """As `measure`, where tokens may be ruled out, and for logits of any size."""
    small_BV, expert_BV = small_BV.log_softmax(-1), expert_BV.log_softmax(-1)
    out_of_small, out_of_expert = small_BV == -math.inf, expert_BV == -math.inf
    small = torch.where(out_of_small, expert_BV - bound, small_BV)
    expert = torch.where(out_of_expert, small_BV - bound, expert_BV)
    small_BV, expert_BV = small.log_softmax(-1), expert.log_softmax(-1)
    delta_BV = (expert_BV - small_BV).masked_fill_(out_of_small & out_of_expert, 0)
    mean_2B = torch.stack([(x.exp() * delta_BV).sum(-1) for x in (expert_BV, small_BV)])
    bounded_B = (out_of_small ^ out_of_expert).sum(-1)
    moved_2B = _beyond_rounding(_two_ways(mean_2B), torch.zeros_like(mean_2B))
    return Move(delta_BV, moved_2B, bounded_B)


def _beyond_rounding(moved_2B: Tensor, lse_2B: Tensor) -> Tensor:
    """Divergences, 0 where they are what rounding of logits of this size makes of 0: an expert that
    is its base, whatever was added to its logits."""
    noise_2B = ROUNDING * torch.finfo(moved_2B.dtype).eps * (1 + lse_2B.abs().amax(0))
    return torch.where(moved_2B < noise_2B, 0, moved_2B)


def _scan_experts(
    large_KV: Tensor,
    deltas: Sequence[Tensor],
    target_2K: Tensor,
    strengths: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Strengths [K, T] and squared distance to the target [K], where one expert acts."""
    grid_N = large_KV.new_tensor(strengths)
    best_K = torch.full_like(target_2K[0], math.inf)
    alpha_KT = large_KV.new_zeros(len(large_KV), len(deltas))
    for t, delta_KV in enumerate(deltas):
        index_K, loss_K = _scan(large_KV, delta_KV, target_2K, grid_N, backend)
        better_K = loss_K < best_K
        best_K = torch.where(better_K, loss_K, best_K)
        alpha_KT[better_K] = 0
        alpha_KT[better_K, t] = grid_N[index_K][better_K]
    return alpha_KT, best_K


def _scan(
    large_KV: Tensor, delta_KV: Tensor, target_2K: Tensor, grid_N: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The index of the first minimiser of one direction, and its squared distance."""
    if backend == "triton":
        from rlalign.kernels.alpha_search_triton import tilt_grid

        start_2K1, moved_2KN = tilt_grid(large_KV, delta_KV, grid_N).split([1, len(grid_N)], -1)
        moved_2KN = _divergences(start_2K1, moved_2KN, grid_N)
        loss_KN = (moved_2KN - target_2K[..., None]).square().sum(0)
    else:
        first = int((grid_N <= FIRST_GUESS).sum()) - 1
        index = _and_next(torch.tensor(max(first, 0), device=grid_N.device), len(grid_N))
        alpha_KC = torch.cat([grid_N.new_zeros(1), grid_N[index]]).expand(len(large_KV), -1)
        start_2K1, moved_2KC = tilt(large_KV, delta_KV, alpha_KC).split([1, len(index)], -1)

        def move_to(rows: Tensor, alpha: Tensor) -> Tensor:
            moved = tilt(large_KV, delta_KV, alpha, rows)
            return _divergences(start_2K1[:, rows], moved, alpha)

        moved_2KC = _divergences(start_2K1, moved_2KC, grid_N[index])
        loss_KN = bracket(move_to, target_2K, grid_N, index, moved_2KC)
    index_K = loss_KN.argmin(-1)
    return index_K, loss_KN.gather(-1, index_K[:, None])[:, 0]


def bracket(
    move_to: Callable[[Tensor, Tensor], Tensor],
    target_2K: Tensor,
    grid_N: Tensor,
    index_C: Tensor,
    moved_2KC: Tensor,
) -> Tensor:
    """Squared distance to the target [K, N] at the strengths of the grid among which the smallest
    is, infinity at those that cannot be smaller and were not looked at.

    `move_to(rows, strengths [rows, C])` gives the divergences [2, rows, C], none of which falls as
    the strength grows (two strengths that move by the same, other than by 0, are not told apart);
    `moved_2KC` are those at `index_C`. Every row goes its own way, two neighbours a round.
    """
    index_N = torch.arange(len(grid_N), device=grid_N.device)
    moved_2KN = target_2K.new_zeros(*target_2K.shape, len(grid_N))
    known_KN = (grid_N == 0).repeat(target_2K.shape[1], 1)  # nothing moves at 0
    moved_2KN[..., index_C], known_KN[:, index_C] = moved_2KC, True
    while True:
        below_2KN = known_KN & (moved_2KN <= target_2K[..., None])
        low_2K = torch.where(below_2KN, index_N, -1).amax(-1)
        high_2K = torch.where(known_KN & ~below_2KN, index_N, len(grid_N)).amin(-1)
        inside_KN = (index_N >= low_2K.amin(0)[:, None]) & (index_N <= high_2K.amax(0)[:, None])
        missing_KN = inside_KN & ~known_KN
        rows = missing_KN.any(-1).nonzero()[:, 0]
        if not len(rows):
            break
        at = _next(moved_2KN, target_2K, grid_N, (low_2K, high_2K), missing_KN)[rows]
        pair = _and_next(at, len(grid_N))
        moved_2KN[:, rows[:, None], pair] = move_to(rows, grid_N[pair])
        known_KN[rows[:, None], pair] = True
    # Where a strength moves nothing, neither does the first, whether it was looked at or not.
    known_KN[:, 0] |= (known_KN & (moved_2KN == 0).all(0)).any(-1)
    loss_KN = (moved_2KN - target_2K[..., None]).square().sum(0)
    return loss_KN.masked_fill_(~known_KN | loss_KN.isnan(), math.inf)


def _and_next(index: Tensor, count: int) -> Tensor:
    """An index and the one after it, [..., 2]."""
    return torch.stack([index, (index + 1).clamp(max=count - 1)], -1)


def _next(
    moved_2KN: Tensor,
    target_2K: Tensor,
    grid_N: Tensor,
    ends: tuple[Tensor, Tensor],
    missing_KN: Tensor,
) -> Tensor:
    """The index [K] to look at next: where the root of a divergence, nearly a line near 0, meets
    the root of its target; once both are between neighbours, what is left between them."""
    low_2K, high_2K = ends
    last = len(grid_N) - 1
    root_2KN = torch.cat([moved_2KN.sqrt(), torch.zeros_like(moved_2KN[..., :1])], -1)
    alpha_N = torch.cat([grid_N, grid_N.new_zeros(1)])  # index -1: at strength 0 nothing moves
    left_2K, right_2K = low_2K % len(alpha_N), high_2K.clamp(max=last)
    is_open_2K = high_2K - low_2K > 1
    at_left, at_right = (root_2KN.gather(-1, i[..., None])[..., 0] for i in (left_2K, right_2K))
    width_2K = torch.where(high_2K > last, alpha_N[left_2K], alpha_N[right_2K] - alpha_N[left_2K])
    rise_2K = torch.where(high_2K > last, at_left, at_right - at_left)
    meet_2K = alpha_N[left_2K] + (target_2K.sqrt() - at_left) * width_2K / rise_2K
    meet_2K = torch.where(meet_2K.isfinite(), meet_2K, FIRST_GUESS)
    guess_2K = torch.searchsorted(grid_N, meet_2K.contiguous(), right=True) - 1
    guess_2K = torch.minimum(torch.maximum(guess_2K, low_2K + 1), high_2K - 1)
    between_K = missing_KN.int().argmax(-1)
    guess_K = torch.where(is_open_2K[1], guess_2K[1], between_K)
    return torch.where(is_open_2K[0], guess_2K[0], guess_K)


def _scan_pairs(
    large_KV: Tensor,
    deltas: Sequence[Tensor],
    target_2K: Tensor,
    strengths: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `_scan_experts`, both experts acting."""
    first_KV, second_KV = deltas
    best_K = torch.full_like(target_2K[0], math.inf)
    alpha_K2 = large_KV.new_zeros(len(large_KV), 2)
    one_K = large_KV.new_ones(len(large_KV))
    for first in strengths:
        for second in strengths:
            delta_KV = first * first_KV + second * second_KV
            loss_K = (divergences(large_KV, delta_KV, one_K) - target_2K).square().sum(0)
            better_K = loss_K < best_K
            best_K = torch.where(better_K, loss_K, best_K)
            alpha_K2[better_K] = large_KV.new_tensor([first, second])
    return alpha_K2, best_K


def _divergences(start_2K: Tensor, moved_2K: Tensor, alpha: Tensor) -> Tensor:
    """From `tilt` at strength 0 and at `alpha`; 0 where they are rounding, so that strengths which
    move nothing (a large model certain of its token, a log-ratio that is the same for all tokens it
    may write) are equally good."""
    kappa = moved_2K[0] - start_2K[0]
    least, most = alpha * start_2K[1], alpha * moved_2K[1]  # kappa is between them
    size = 1 + start_2K[0].abs() + least.abs() + most.abs()
    moved_2K = torch.stack([most - kappa, kappa - least])
    return torch.where(moved_2K < STILL * torch.finfo(size.dtype).eps * size, 0, moved_2K)


def _block_size(x_BV: Tensor) -> int:
    """How many rows are worked on together: their temporaries fit the cache of a core."""
    row_bytes = x_BV.shape[-1] * x_BV.element_size()
    return max(1, len(x_BV)) if x_BV.is_cuda else max(1, BLOCK_BYTES // row_bytes)


def _take(x_BV: Tensor, rows: Tensor) -> Tensor:
    """Some rows; all of them without a copy. `rows` are ascending."""
    return x_BV if len(rows) == len(x_BV) else x_BV[rows]
