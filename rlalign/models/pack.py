"""Token sequences laid end to end, a common beginning only once, and the way to a padded grid.

A sequence may continue another one: it then holds its own tokens only and sees those of all its
ancestors before them (its context). A group of completions is a tree of depth one: the prompt, and
each completion continuing it. As a later token never changes an earlier one, the hidden states are
those of the whole rows, and the gradient of a shared token is the sum over the rows that share it.

Shapes: S sequences, N tokens of all of them, C context tokens, b sequences of a bucket, t tokens of
its longest (context included), n own tokens of a bucket, m of its own and context tokens, M = N + C
(0 without context).
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
    """`count` consecutive sequences of a pack, with their context at most `width` tokens each.

    They have `tokens` of their own and `context` tokens before them. `cell_n` is where each own
    token lies in the padded [b * t] grid, `cell_m` where each own and then each context token does;
    None: no padding and no context, a view does.
    """

    count: int
    width: int
    tokens: int
    context: int
    cell_n: Tensor | None
    cell_m: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Pack:
    """S sequences laid end to end, longest (with its context) first.

    `start[i]` is the place in the pack of the first token of the i-th sequence as given.

    >>> pack = make_pack([(5, 6), (7, 8, 9), (4,)], parents=[None, None, 0])
    >>> pack.input_ids_N.tolist(), pack.position_ids_N.tolist(), pack.start
    ([7, 8, 9, 4, 5, 6], [0, 1, 2, 2, 0, 1], (4, 0, 3))
    >>> pack.context_C.tolist()  # what the 4 sees before itself
    [4, 5]
    """

    input_ids_N: Tensor
    position_ids_N: Tensor
    start: tuple[int, ...]
    lengths: tuple[int, ...]  # own tokens, in the pack's order
    contexts: tuple[int, ...]  # context tokens, in the pack's order
    boundaries: Tensor  # [S + 1] int32, cumulative lengths
    context_C: Tensor  # places of the context tokens, sequence by sequence
    key_M: Tensor  # the same with each sequence's own tokens behind its context
    key_boundaries: Tensor  # [S + 1] int32, cumulative lengths with context
    buckets: tuple[Bucket, ...]


def make_pack(
    sequences: Sequence[Sequence[int]],
    parents: Sequence[int | None] | None = None,
    device: torch.device | str | None = None,
) -> Pack:
    """Lay token id sequences end to end; sequence i continues sequence `parents[i]`, given before
    it. Raises ValueError where there is none, an empty one, or a parent that does not come before.
    """
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise ValueError("a pack needs at least one sequence, and a token in each")
    paths = _paths(parents if parents is not None else [None] * len(sequences))
    depth = [sum(len(sequences[j]) for j in path) for path in paths]
    order = sorted(range(len(sequences)), key=lambda i: -(depth[i] + len(sequences[i])))
    lengths = tuple(len(sequences[i]) for i in order)
    contexts = tuple(depth[i] for i in order)
    start, total = [0] * len(order), 0
    for i, length in zip(order, lengths, strict=True):
        start[i], total = total, total + length
    length_S, context_S = torch.tensor(lengths), torch.tensor(contexts)
    boundaries = F.pad(length_S.cumsum(0), (1, 0))
    first_N = (boundaries[:-1] - context_S).repeat_interleave(length_S)
    own = [
        range(first, first + len(sequence))
        for first, sequence in zip(start, sequences, strict=True)
    ]
    context = [place for i in order for j in paths[i] for place in own[j]]
    keys = [place for i in order for j in (*paths[i], i) for place in own[j]] if context else []
    return Pack(
        input_ids_N=torch.tensor([token for i in order for token in sequences[i]]).to(device),
        position_ids_N=(torch.arange(total) - first_N).to(device),
        start=tuple(start),
        lengths=lengths,
        contexts=contexts,
        boundaries=boundaries.to(device, torch.int32),
        context_C=torch.tensor(context, dtype=torch.long).to(device),
        key_M=torch.tensor(keys, dtype=torch.long).to(device),
        key_boundaries=F.pad((length_S + context_S).cumsum(0), (1, 0)).to(device, torch.int32),
        buckets=tuple(_bucket(*part, device) for part in _split(lengths, contexts)),
    )


def collect(rows: Tensor, index_n: Tensor) -> Tensor:
    """Rows `index_n` of `rows`; index_select, with a quicker gradient that adds up in float32."""
    return _Collect.apply(rows, index_n)


def spread(rows: Tensor, cell_n: Tensor, cells: int) -> Tensor:
    """Zeros [cells, ...] with `rows` [n, ...] at `cell_n` (no cell twice)."""
    return _Spread.apply(rows, cell_n, cells)


def refuse_unless(fine: bool, model: nn.Module, reason: str) -> None:
    if not fine:
        raise PackingError(
            f"{type(model).__name__} cannot run on packed sequences: {reason}; "
            "set trainer.packing=false"
        )


def _paths(parents: Sequence[int | None]) -> list[tuple[int, ...]]:
    """The ancestors of each sequence, the root first."""
    paths: list[tuple[int, ...]] = []
    for i, parent in enumerate(parents):
        if parent is not None and not 0 <= parent < i:
            raise ValueError(f"sequence {i} continues sequence {parent}, which is not before it")
        paths.append(() if parent is None else (*paths[parent], parent))
    return paths


def _split(lengths: Sequence[int], contexts: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Own and context lengths of each bucket."""
    parts: list[tuple[list[int], list[int]]] = []
    for length, context in zip(lengths, contexts, strict=True):  # longest first
        longest = parts[-1][0][0] + parts[-1][1][0] if parts else 0
        if not parts or length + context < BUCKET_RATIO * longest:
            parts.append(([], []))
        parts[-1][0].append(length)
        parts[-1][1].append(context)
    return parts


def _bucket(lengths: list[int], contexts: list[int], device: torch.device | str | None) -> Bucket:
    count, width, tokens = len(lengths), lengths[0] + contexts[0], sum(lengths)
    if tokens == count * width:
        return Bucket(count, width, tokens, 0, None, None)
    context_b1 = torch.tensor(contexts)[:, None]
    own_b1 = torch.tensor(lengths)[:, None]
    place_bt = torch.arange(width).expand(count, width)
    before_bt = place_bt < context_b1
    own_bt = ~before_bt & (place_bt < context_b1 + own_b1)
    cell_n = own_bt.flatten().nonzero()[:, 0]
    cell_m = torch.cat([cell_n, before_bt.flatten().nonzero()[:, 0]])
    return Bucket(count, width, tokens, sum(contexts), cell_n.to(device), cell_m.to(device))


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
    """Rows `index_n` of a tensor: a row taken k times gets the sum of k gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_n: Tensor) -> Tensor:
        ctx.save_for_backward(index_n)
        ctx.count = len(rows)
        return rows.index_select(0, index_n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (index_n,) = ctx.saved_tensors
        (grad,) = grad_outputs
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = torch.zeros(ctx.count, *grad.shape[1:], dtype=wide, device=grad.device)
        return total.index_add_(0, index_n, grad.to(wide)).to(grad.dtype), None
