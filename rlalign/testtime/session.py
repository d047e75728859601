"""Searches that run side by side: each asks its questions of the model, one driver answers.

A search is a generator that yields requests and is sent the replies. The driver gathers what all
searches ask for at the moment into common forward passes; since a row of a masked-diffusion model
depends on that row alone, a search cannot tell whether it is alone.

Legend: B rows, T columns, V vocabulary, L columns read.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlalign.config.reflect import ReflectConfig
from rlalign.models.masked_diffusion import Canvas, MaskedModel
from rlalign.rollout.seeds import sample_seed
from rlalign.rollout.unmask import Unmasked, UnmaskParams, unmask
from rlalign.testtime.problem import Problem

R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """Fill what is masked; the reply is an `Unmasked`."""

    canvas: Canvas
    params: UnmaskParams
    seed_B: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Log-probs of the tokens at `columns`; the reply is float32 [B, L, V]."""

    canvas: Canvas
    columns: tuple[int, ...]


Request = Fill | Read
Search = Generator[Request, Any, R]


class Session:
    """One search's dealings with the model, and what they cost: `forwards` one after another (what
    a latency is made of), and `row_forwards`, the rows of all of them (the compute)."""

    def __init__(self, problem: Problem, mask_id: int, config: ReflectConfig) -> None:
        canvas = problem.canvas
        self.problem, self.mask_id, self.config = problem, mask_id, config
        self.free_T = canvas.ids_BT[0] == mask_id
        if canvas.real_BT is not None:
            self.free_T = self.free_T & canvas.real_BT[0]
        self.forwards = self.row_forwards = 0

    def fill(
        self, ids_BT: Tensor, step: int, temperature: float = 0.0, first: int = 0
    ) -> Search[Unmasked]:
        """Fill what is masked in the rows; they are samples `first`, `first` + 1, ... of `step`."""
        config = self.config
        params = UnmaskParams(config.steps, config.block_size, temperature)
        index = range(first, first + len(ids_BT))
        seeds = [sample_seed(config.seed, self.problem.id, i, step) for i in index]
        seed_B = torch.tensor(seeds, dtype=torch.int64, device=ids_BT.device)
        filled: Unmasked = yield Fill(self._canvas(ids_BT), params, seed_B)
        self.forwards += int(filled.forwards_B.max())
        self.row_forwards += int(filled.forwards_B.sum())
        return filled

    def read(self, ids_BT: Tensor, columns: Sequence[int]) -> Search[Tensor]:
        """Log-probs of the tokens at `columns`, float32 [B, L, V]."""
        logp_BLV: Tensor = yield Read(self._canvas(ids_BT), tuple(columns))
        self.forwards += 1
        self.row_forwards += len(ids_BT)
        return logp_BLV

    def _canvas(self, ids_BT: Tensor) -> Canvas:
        same_B = torch.zeros(len(ids_BT), dtype=torch.int64, device=ids_BT.device)
        return self.problem.canvas.rows(same_B).with_ids(ids_BT)


@torch.no_grad()
def run_searches(model: MaskedModel, searches: Sequence[Search[R]], max_rows: int = 256) -> list[R]:
    """Run all searches to their ends, with at most `max_rows` rows in a forward pass."""
    results: dict[int, R] = {}
    pending: dict[int, Request] = {}

    def advance(index: int, reply: Any) -> None:
        try:
            pending[index] = searches[index].send(reply)
        except StopIteration as stop:
            results[index] = stop.value

    for index in range(len(searches)):
        advance(index, None)
    while pending:
        groups: dict[Any, dict[int, Request]] = {}
        for index, request in pending.items():
            groups.setdefault(_kind(request), {})[index] = request
        pending = {}
        for group in groups.values():
            for index, reply in zip(
                group, _answer(model, [*group.values()], max_rows), strict=True
            ):
                advance(index, reply)
    return [results[index] for index in range(len(searches))]


def _kind(request: Request) -> tuple[Any, ...]:
    """Requests of one kind can share a forward pass."""
    canvas = request.canvas
    cond = {name: value.shape[1:] for name, value in (canvas.cond or {}).items()}
    how = request.params if isinstance(request, Fill) else request.columns
    return how, canvas.ids_BT.shape[1], canvas.real_BT is None, tuple(sorted(cond.items()))


def _answer(model: MaskedModel, requests: Sequence[Request], max_rows: int) -> list[Any]:
    """The replies to requests of one kind."""
    canvas = _concatenate([request.canvas for request in requests])
    sizes = [len(request.canvas) for request in requests]
    chunks = torch.arange(len(canvas), device=canvas.ids_BT.device).split(max_rows)
    first = requests[0]
    if isinstance(first, Read):
        parts = [_read(model, canvas.rows(index_B), first.columns) for index_B in chunks]
        return list(torch.cat(parts).split(sizes))
    seed_B = torch.cat([request.seed_B for request in requests if isinstance(request, Fill)])
    fills = [unmask(model, canvas.rows(rows), first.params, seed_B[rows]) for rows in chunks]
    names = ("ids_BT", "step_BT", "logp_BT", "confidence_BT", "forwards_B")
    columns = [torch.cat([getattr(part, name) for part in fills]).split(sizes) for name in names]
    return [Unmasked(*values) for values in zip(*columns, strict=True)]


def _read(model: MaskedModel, canvas: Canvas, columns: Sequence[int]) -> Tensor:
    start = min(columns)
    logits_BLV = model.logits(canvas, start, max(columns) + 1)
    return logits_BLV[:, [column - start for column in columns]].log_softmax(-1)


def _concatenate(canvases: Sequence[Canvas]) -> Canvas:
    ids_BT = torch.cat([canvas.ids_BT for canvas in canvases])
    real = [canvas.real_BT for canvas in canvases if canvas.real_BT is not None]
    cond = [canvas.cond for canvas in canvases if canvas.cond is not None]
    return Canvas(
        ids_BT,
        torch.cat(real) if real else None,
        {name: torch.cat([part[name] for part in cond]) for name in cond[0]} if cond else None,
    )
