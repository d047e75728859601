"""Which tokens of a batch go through the model, and where what comes out belongs.

Rows form a tree: what several of them begin with is one path in it. The model needs each of its
tokens once, and only those that another one follows; the head needs each token that is predicted
once. Rows in lexicographic order, from the last to the first, are a walk through that tree in
depth, so a row continues the one before it after as many tokens as the two have in common
(models/pack.py): none is run twice. A row that another one continues comes after it, and adds none.

Shapes: B rows, T completion columns, M completion tokens of all rows, U different ones, R rows with
a completion.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlalign.models.pack import Pack
from rlalign.trainer.packing import Row
from rlalign.types import TrainBatch


class Predictions(NamedTuple):
    """What the head computes: tokens `target_U`, each from the hidden state at `place_U` of a pack.
    The m-th completion token is the `index_M[m]`-th of them."""

    place_U: Tensor
    target_U: Tensor
    index_M: Tensor


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Sequences to run (with their parents as `make_pack` wants them), and for each completion
    token the place of the one before it.

    `cell_M` are the tokens' cells in [B * T]; there are none in an idle plan.
    """

    sequences: list[np.ndarray]
    parents: list[tuple[int, int] | None]
    sequence_M: Tensor  # on its path is the token before
    offset_M: Tensor  # where on it
    target_M: Tensor  # the completion tokens
    cell_M: Tensor

    def places(self, pack: Pack) -> Tensor:
        """Where in `pack`, made of the plan's sequences, the token before each one is: [M]."""
        return pack.path_M[torch.tensor(pack.path_start)[self.sequence_M] + self.offset_M]

    def predictions(self, pack: Pack) -> Predictions:
        """Each different pair of a place and a target once."""
        width = int(self.target_M.max()) + 1
        key_M = self.places(pack) * width + self.target_M
        key_U, index_M = torch.unique(key_M, return_inverse=True)
        return Predictions(key_U // width, key_U % width, index_M)


def plan_rows(batch: TrainBatch, *, share_prefixes: bool) -> RowPlan:
    """Without `share_prefixes` every row runs alone. Raises ValueError for a completion without a
    prompt token before it."""
    length_B = batch.completion_len_B.cpu()
    row_R = length_B.nonzero()[:, 0]
    if not len(row_R):
        return _idle_plan()
    length_R = length_B[row_R]
    rows = [_tokens(batch.sequences[i]) for i in row_R.tolist()]
    prompt_R = torch.tensor([len(row) for row in rows]) - length_R
    if int(prompt_R.min()) < 1:
        raise ValueError("a completion needs at least one prompt token before it")
    sequences, parents, sequence_R = _cut([row[:-1] for row in rows], share_prefixes)
    column_M = torch.arange(int(length_R.sum()))
    column_M -= (length_R.cumsum(0) - length_R).repeat_interleave(length_R)
    completions = [row[n:] for row, n in zip(rows, prompt_R.tolist(), strict=True)]
    return RowPlan(
        sequences=sequences,
        parents=parents,
        sequence_M=torch.tensor(sequence_R).repeat_interleave(length_R),
        offset_M=(prompt_R - 1).repeat_interleave(length_R) + column_M,
        target_M=torch.from_numpy(np.concatenate(completions).astype(np.int64)),
        cell_M=row_R.repeat_interleave(length_R) * batch.mask_BT.shape[1] + column_M,
    )


def rows_to_run(batch: TrainBatch, *, share_prefixes: bool) -> tuple[list[int], list[Row]]:
    """The batch's row indices in the order that a plan of micro-batches needs, and its rows in that
    order: neighbours with much in common; without `share_prefixes` the longest first."""
    if share_prefixes:
        keys = prompt_keys(batch)
        order, common = _walk([_tokens(row)[:-1] for row in batch.sequences])
    else:
        keys = range(len(batch))
        order = sorted(keys, key=lambda i: -len(batch.sequences[i]))
        common = [0] * len(order)
    rows = [
        Row(len(batch.sequences[i]) - 1, keys[i], length)
        for i, length in zip(order, common, strict=True)
    ]
    return order, rows


def prompt_keys(batch: TrainBatch) -> list[int]:
    """A number for each row, the same for rows with the same prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    lengths = batch.completion_len_B.tolist()
    return [
        numbers.setdefault(row[: len(row) - n], len(numbers))
        for row, n in zip(batch.sequences, lengths, strict=True)
    ]


def _tokens(row: Sequence[int]) -> np.ndarray:
    """uint32; from a tuple, twice as fast as numpy."""
    return np.frombuffer(array("I", row), dtype=np.uint32)


def _walk(rows: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Row indices in descending lexicographic order (a row after those that continue it), and how
    many tokens each has in common with the one before it."""
    keys = [row.astype(">u4").tobytes() for row in rows]  # bytes are ordered as big-endian numbers
    order = sorted(range(len(rows)), key=keys.__getitem__, reverse=True)
    common = [_common(rows[i], rows[j]) for i, j in pairwise(order)]
    return order, [0, *common][: len(order)]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def _cut(
    rows: list[np.ndarray], share_prefixes: bool
) -> tuple[list[np.ndarray], list[tuple[int, int] | None], list[int]]:
    """Sequences with their parents, and for each row the sequence whose path begins with it."""
    order, common = _walk(rows) if share_prefixes else (range(len(rows)), [0] * len(rows))
    sequences: list[np.ndarray] = []
    parents: list[tuple[int, int] | None] = []
    sequence_R = [0] * len(rows)
    for i, length in zip(order, common, strict=True):
        if length < len(rows[i]):
            parents.append((len(sequences) - 1, length) if length else None)
            sequences.append(rows[i][length:])
        sequence_R[i] = len(sequences) - 1
    return sequences, parents, sequence_R


def _idle_plan() -> RowPlan:
    """One token through the model, its log-prob nowhere: collectives need every process."""
    zero = torch.zeros(1, dtype=torch.long)
    return RowPlan([np.zeros(1, dtype=np.int64)], [None], zero, zero, zero, zero[:0])
