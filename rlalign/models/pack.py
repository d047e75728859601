"""Token sequences laid end to end, a common beginning only once, and the way to a padded grid.

A sequence may continue another one from any token of it: it then holds its own tokens only, and
sees the first k of the other's path before them, its context; its path is both. So rows that begin
alike become a tree, and no sequence is needed for the beginnings: the first row holds them. As a
later token never changes an earlier one, the hidden states are those of the whole rows, and the
gradient of a shared token is the sum over the rows that share it.

Shapes: S sequences, N tokens of all of them, M tokens of all their paths; b sequences of a bucket,
t tokens of its longest path; Q and C cells of all buckets, for queries and for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlalign.errors import RlalignError

Tokens = Sequence[int] | np.ndarray
BUCKET_RATIO = 0.8  # a path shorter than this share of its bucket's longest opens a new one
# Where a sequence's own tokens are at most this share of its path, only they get cells for queries:
# attention with a mask then takes less time than causal attention over the whole path. The smaller
# shares keep sequences together that are about equally far below it.
OWN_SHARES = (0.7, 0.35, 0.15)


class PackingError(RlalignError, RuntimeError):
    """The model cannot run on packed sequences; the message names it and the fix."""


@dataclass(frozen=True, eq=False, slots=True)
class Bucket:
    """`count` consecutive sequences of a pack as rows of a padded grid.

    A row has `keys` cells for a path and `queries` cells: as many, for the path again, where
    `context_b` is None; else for a sequence's own tokens alone, with `context_b` tokens before.
    """

    count: int
    keys: int
    queries: int
    context_b: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Pack:
    """S sequences laid end to end, bucket by bucket, the longest path of each bucket first.

    `start[i]` is the place in the pack of the first token of the i-th sequence as given,
    `path_start[i]` where in `path_M` its path begins.

    >>> pack = make_pack([(5, 6, 1), (7, 8, 9), (4,)], parents=[None, None, (0, 2)])
    >>> pack.input_ids_N.tolist(), pack.position_ids_N.tolist(), pack.start
    ([5, 6, 1, 7, 8, 9, 4], [0, 1, 2, 0, 1, 2, 2], (0, 3, 6))
    >>> pack.path_M[pack.path_start[2] :].tolist()  # the places of 5, 6 and 4
    [0, 1, 6]
    """

    input_ids_N: Tensor
    position_ids_N: Tensor
    start: tuple[int, ...]
    lengths: tuple[int, ...]  # own tokens, in the pack's order
    contexts: tuple[int, ...]  # context tokens, in the pack's order
    boundaries: Tensor  # [S + 1] int32, cumulative lengths
    path_M: Tensor  # places of the tokens of each path, in the pack's order; on the CPU
    path_start: tuple[int, ...]
    key_M: Tensor  # path_M where the model is
    key_boundaries: Tensor  # [S + 1] int32, cumulative lengths of paths
    buckets: tuple[Bucket, ...]
    query_Q: Tensor  # the place of the token in each cell; beyond a path its last token again
    key_C: Tensor
    cell_N: Tensor  # the cell of each token among those for queries

    @property
    def shares(self) -> bool:
        """Whether a token is on several paths."""
        return any(self.contexts)

    @property
    def dense(self) -> bool:
        """Whether the tokens as they lie are the grids: no padding, no context."""
        return not self.shares and len(self.query_Q) == len(self.input_ids_N)


def make_pack(
    sequences: Sequence[Tokens],
    parents: Sequence[tuple[int, int] | None] | None = None,
    device: torch.device | str | None = None,
) -> Pack:
    """Lay token id sequences end to end; where `parents[i]` is (j, k), sequence i continues the
    first k tokens of the path of sequence j.

    Raises ValueError without a sequence, for an empty one, for a parent that does not come before
    its child, and for a k below 1 or beyond that path.
    """
    if not len(sequences) or not all(len(sequence) for sequence in sequences):
        raise ValueError("a pack needs at least one sequence, and a token in each")
    parents = [None] * len(sequences) if parents is None else parents
    own_S = np.array([len(sequence) for sequence in sequences])
    context_S = np.array([0 if parent is None else parent[1] for parent in parents])
    path_S = context_S + own_S
    _refuse_missing_parents(parents, path_S)
    kind_S = np.sum([own_S <= share * path_S for share in OWN_SHARES], axis=0)
    order = np.lexsort((-path_S, kind_S))  # by kind, then the longest path first
    start_S, path_start_S = _starts(own_S, order), _starts(path_S, order)
    paths = _paths(start_S, own_S, parents)
    path_M = np.concatenate([paths[i] for i in order])
    grids = [
        _grid(path_M, path_start_S[part], context_S[part], own_S[part], bool(kind_S[part[0]]))
        for part in _split(order, kind_S, path_S)
    ]
    first_cell = np.cumsum([0] + [len(grid.query) for grid in grids])
    cells = [first + grid.cell for first, grid in zip(first_cell, grids, strict=False)]
    tokens = np.concatenate([np.asarray(sequences[i], dtype=np.int64) for i in order])
    before_S = (start_S - context_S)[order]

    def put(array: np.ndarray, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.from_numpy(array).to(device, dtype)

    return Pack(
        input_ids_N=put(tokens),
        position_ids_N=put(np.arange(len(tokens)) - before_S.repeat(own_S[order])),
        start=tuple(start_S.tolist()),
        lengths=tuple(own_S[order].tolist()),
        contexts=tuple(context_S[order].tolist()),
        boundaries=put(np.append(0, own_S[order].cumsum()), torch.int32),
        path_M=torch.from_numpy(path_M),
        path_start=tuple(path_start_S.tolist()),
        key_M=put(path_M),
        key_boundaries=put(np.append(0, path_S[order].cumsum()), torch.int32),
        buckets=tuple(
            Bucket(g.count, g.keys, g.queries, None if g.context_b is None else put(g.context_b))
            for g in grids
        ),
        query_Q=put(np.concatenate([grid.query for grid in grids])),
        key_C=put(np.concatenate([grid.key for grid in grids])),
        cell_N=put(np.concatenate(cells)),
    )


def collect(rows: Tensor, index_n: Tensor) -> Tensor:
    """Rows `index_n` of `rows`; index_select, with a quicker gradient that adds up in float32."""
    return _Collect.apply(rows, index_n)


def to_cells(rows: Tensor, place_c: Tensor, cell_n: Tensor) -> Tensor:
    """Rows `place_c` of `rows`, each of which is in one cell, `cell_n`, and in no other but as
    padding: cells whose gradient is 0."""
    return _ToCells.apply(rows, place_c, cell_n)


def refuse_unless(fine: bool, model: nn.Module, reason: str) -> None:
    if not fine:
        raise PackingError(
            f"{type(model).__name__} cannot run on packed sequences: {reason}; "
            "set trainer.packing=false"
        )


def _refuse_missing_parents(parents: Sequence[tuple[int, int] | None], path_S: np.ndarray) -> None:
    for i, (j, length) in ((i, parent) for i, parent in enumerate(parents) if parent is not None):
        if not 0 <= j < i:
            raise ValueError(f"sequence {i} continues sequence {j}, which is not before it")
        if not 1 <= length <= path_S[j]:
            raise ValueError(
                f"sequence {i} continues the first {length} tokens of sequence {j}, whose path "
                f"has {path_S[j]}"
            )


def _starts(length_S: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Where each sequence begins, with all of them end to end in `order`."""
    start_S = np.empty_like(length_S)
    start_S[order] = length_S[order].cumsum() - length_S[order]
    return start_S


def _paths(
    start_S: np.ndarray, own_S: np.ndarray, parents: Sequence[tuple[int, int] | None]
) -> list[np.ndarray]:
    """The places of the tokens of each path."""
    paths: list[np.ndarray] = []
    for start, length, parent in zip(start_S, own_S, parents, strict=True):
        own = np.arange(start, start + length)
        paths.append(own if parent is None else np.append(paths[parent[0]][: parent[1]], own))
    return paths


def _split(order: np.ndarray, kind_S: np.ndarray, path_S: np.ndarray) -> list[np.ndarray]:
    """The sequences of each bucket."""
    cuts, first = [], order[0]
    for at, i in enumerate(order):
        if kind_S[i] != kind_S[first] or path_S[i] < BUCKET_RATIO * path_S[first]:
            cuts.append(at)
            first = i
    return np.split(order, cuts)


class _Grid(NamedTuple):
    """A bucket with the places in its cells, row by row, and the cells of the own tokens."""

    count: int
    keys: int
    queries: int
    context_b: np.ndarray | None
    query: np.ndarray
    key: np.ndarray
    cell: np.ndarray


def _grid(
    path_M: np.ndarray, start_b: np.ndarray, context_b: np.ndarray, own_b: np.ndarray, trimmed: bool
) -> _Grid:
    before_b = context_b if trimmed else np.zeros_like(context_b)  # what has no cells for queries
    path_b = context_b + own_b
    keys, queries = path_b.max(), (path_b - before_b).max()

    def places(start_b: np.ndarray, length_b: np.ndarray, width: int) -> np.ndarray:
        column_bt = np.minimum(np.arange(width), length_b[:, None] - 1)
        return path_M[start_b[:, None] + column_bt].ravel()

    column_t = np.arange(queries)
    own_bt = (column_t >= (context_b - before_b)[:, None]) & (
        column_t < (path_b - before_b)[:, None]
    )
    return _Grid(
        count=len(own_b),
        keys=int(keys),
        queries=int(queries),
        context_b=context_b if trimmed else None,
        query=places(start_b + before_b, path_b - before_b, queries),
        key=places(start_b, path_b, keys),
        cell=own_bt.ravel().nonzero()[0],
    )


class _ToCells(torch.autograd.Function):
    """The gradient is a plain gather (index_select's own backward adds row by row)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place_c: Tensor, cell_n: Tensor) -> Tensor:
        ctx.save_for_backward(cell_n)
        return rows.index_select(0, place_c)

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
