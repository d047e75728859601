"""Which tokens of a batch go through the model, and where what comes out belongs.

A row goes without its last token, whose prediction nobody needs. Rows with the same prompt (the
samples of a group) run it once: it becomes a sequence of its own, which their completions continue
(models/pack.py). The token before completion token t is then

    t = 0:  the prompt's last;      t > 0:  the completion's token t - 1.

Shapes: B rows, T completion columns, M completion tokens of all rows, R rows with a completion.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.models.pack import Pack
from rlalign.types import TrainBatch


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Sequences to run, and for each completion token the place of the one before it.

    `cell_M` are the tokens' cells in [B * T]; there are none in an idle plan.
    """

    sequences: list[tuple[int, ...]]
    parents: list[int | None]
    sequence_M: Tensor  # holds the token before
    offset_M: Tensor  # where in it
    target_M: Tensor  # the completion tokens
    cell_M: Tensor

    def places(self, pack: Pack) -> Tensor:
        """Where in `pack`, made of the plan's sequences, the token before each one is: [M]."""
        return torch.tensor(pack.start)[self.sequence_M] + self.offset_M


def plan_rows(batch: TrainBatch, *, share_prompts: bool) -> RowPlan:
    """Raises ValueError for a completion without a prompt token before it."""
    length_B = batch.completion_len_B.cpu()
    row_R = length_B.nonzero()[:, 0]
    if not len(row_R):
        return _idle_plan()
    length_R = length_B[row_R]
    rows = [batch.sequences[i] for i in row_R.tolist()]
    prompts = [row[: len(row) - n] for row, n in zip(rows, length_R.tolist(), strict=True)]
    if not all(prompts):
        raise ValueError("a completion needs at least one prompt token before it")
    sequences, parents, first, rest = _cut(rows, prompts, share_prompts)
    column_M = torch.arange(int(length_R.sum()))
    column_M = column_M - (length_R.cumsum(0) - length_R).repeat_interleave(length_R)
    before_M = torch.where(  # (sequence, offset) of the token before
        column_M == 0,
        torch.tensor(first).T.repeat_interleave(length_R, 1),
        torch.tensor(rest).T.repeat_interleave(length_R, 1),
    )
    return RowPlan(
        sequences=sequences,
        parents=parents,
        sequence_M=before_M[0],
        offset_M=before_M[1] + (column_M - 1).clamp(min=0),
        target_M=torch.tensor(
            [t for row, prompt in zip(rows, prompts, strict=True) for t in row[len(prompt) :]]
        ),
        cell_M=row_R.repeat_interleave(length_R) * batch.mask_BT.shape[1] + column_M,
    )


def prompt_keys(batch: TrainBatch) -> list[int]:
    """A number for each row, the same for rows with the same prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    lengths = batch.completion_len_B.tolist()
    return [
        numbers.setdefault(row[: len(row) - n], len(numbers))
        for row, n in zip(batch.sequences, lengths, strict=True)
    ]


def _cut(
    rows: list[tuple[int, ...]], prompts: list[tuple[int, ...]], share_prompts: bool
) -> tuple[list[tuple[int, ...]], list[int | None], list[list[int]], list[list[int]]]:
    """Sequences with their parents, and for each row the (sequence, offset) of its prompt's last
    token and of its completion's first."""
    count = Counter(prompts) if share_prompts else Counter()
    sequences: list[tuple[int, ...]] = []
    parents: list[int | None] = []
    place: dict[tuple[int, ...], int] = {}  # of shared prompts
    first, rest = [], []

    def add(tokens: tuple[int, ...], parent: int | None) -> int:
        sequences.append(tokens)
        parents.append(parent)
        return len(sequences) - 1

    for row, prompt in zip(rows, prompts, strict=True):
        length = len(prompt)
        if count[prompt] < 2:
            whole = add(row[:-1], None)
            first.append([whole, length - 1])
            rest.append([whole, length])
            continue
        if prompt not in place:
            place[prompt] = add(prompt, None)
        root, tail = place[prompt], row[length:-1]
        first.append([root, length - 1])
        rest.append([add(tail, root) if tail else root, 0])  # without a tail nothing follows
    return sequences, parents, first, rest


def _idle_plan() -> RowPlan:
    """One token through the model, its log-prob nowhere: collectives need every process."""
    zero = torch.zeros(1, dtype=torch.long)
    return RowPlan([(0,)], [None], zero, zero, zero, zero[:0])
