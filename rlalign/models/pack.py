"""Sequences of tokens laid end to end, and the way back to a padded grid.

Shapes: S sequences, N tokens of all of them, b sequences of a bucket, t tokens of its longest,
n tokens of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlalign.errors import RlalignError

BUCKET_RATIO = 0.8  # a sequence shorter than this share of its bucket's longest opens a new one


class PackingError(RlalignError, RuntimeError):
    """The model cannot run on packed sequences; the message names it and the fix."""


@dataclass(frozen=True, eq=False, slots=True)
class Bucket:
    """`count` consecutive sequences of a pack, at most `width` tokens each, `tokens` in all.
    `cell_n` is where each token lies in the padded [b * t] grid; None: no padding, a view does."""

    count: int
    width: int
    tokens: int
    cell_n: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Pack:
    """S sequences laid end to end, longest first.

    `start[i]` is the place in the pack of the first token of the i-th sequence as given.

    >>> pack = make_pack([(5, 6), (7, 8, 9)])
    >>> pack.input_ids_N.tolist(), pack.position_ids_N.tolist(), pack.start
    ([7, 8, 9, 5, 6], [0, 1, 2, 0, 1], (3, 0))
    """

    input_ids_N: Tensor
    position_ids_N: Tensor
    start: tuple[int, ...]
    lengths: tuple[int, ...]  # in the pack's order
    boundaries: Tensor  # [S + 1] int32, cumulative lengths
    buckets: tuple[Bucket, ...]


def make_pack(sequences: Sequence[Sequence[int]], device: torch.device | str | None = None) -> Pack:
    """Lay token id sequences end to end. Raises ValueError where there is none or an empty one."""
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise ValueError("a pack needs at least one sequence, and a token in each")
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    lengths = tuple(len(sequences[i]) for i in order)
    start, total = [0] * len(order), 0
    for i, length in zip(order, lengths, strict=True):
        start[i], total = total, total + length
    length_S = torch.tensor(lengths)
    boundaries = F.pad(length_S.cumsum(0), (1, 0))
    position_ids_N = torch.arange(total) - boundaries[:-1].repeat_interleave(length_S)
    input_ids_N = torch.tensor([token for i in order for token in sequences[i]])
    return Pack(
        input_ids_N=input_ids_N.to(device),
        position_ids_N=position_ids_N.to(device),
        start=tuple(start),
        lengths=lengths,
        boundaries=boundaries.to(device, torch.int32),
        buckets=tuple(_bucket(part, device) for part in _split_lengths(lengths)),
    )


def collect(rows: Tensor, index_n: Tensor) -> Tensor:
    """Rows `index_n` (no index twice) of `rows`: index_select with a quick gradient."""
    return _Collect.apply(rows, index_n)


def spread(rows: Tensor, cell_n: Tensor, cells: int) -> Tensor:
    """Zeros [cells, ...] with `rows` [n, ...] at `cell_n` (no cell twice): the inverse of
    `collect`."""
    return _Spread.apply(rows, cell_n, cells)


def refuse_unless(fine: bool, model: nn.Module, reason: str) -> None:
    if not fine:
        raise PackingError(
            f"{type(model).__name__} cannot run on packed sequences: {reason}; "
            "set trainer.packing=false"
        )


def _split_lengths(lengths: Sequence[int]) -> list[list[int]]:
    parts: list[list[int]] = []
    for length in lengths:  # longest first
        if parts and length >= BUCKET_RATIO * parts[-1][0]:
            parts[-1].append(length)
        else:
            parts.append([length])
    return parts


def _bucket(lengths: list[int], device: torch.device | str | None) -> Bucket:
    count, width, tokens = len(lengths), lengths[0], sum(lengths)
    if tokens == count * width:
        return Bucket(count, width, tokens, None)
    real_bt = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Bucket(count, width, tokens, real_bt.flatten().nonzero()[:, 0].to(device))


class _Spread(torch.autograd.Function):
    """Rows [n, ...] put at `cell_n` of zeros [cells, ...]; each cell is hit at most once, so the
    gradient is a plain gather (index_select's own backward adds row by row)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cell_n: Tensor, cells: int) -> Tensor:
        ctx.save_for_backward(cell_n)
        return rows.new_zeros(cells, *rows.shape[1:]).index_copy_(0, cell_n, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (cell_n,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, cell_n), None, None


class _Collect(torch.autograd.Function):
    """Rows `cell_n` of a grid [cells, ...]: the inverse of _Spread."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, cell_n: Tensor) -> Tensor:
        ctx.save_for_backward(cell_n)
        ctx.cells = len(grid)
        return grid.index_select(0, cell_n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (cell_n,) = ctx.saved_tensors
        grad = grad_outputs[0]
        return grad.new_zeros(ctx.cells, *grad.shape[1:]).index_copy_(0, cell_n, grad), None
