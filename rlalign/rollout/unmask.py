"""Filling a canvas: which masked positions are decided at a step, and with which tokens.

    while a position of the block is masked:
        logits of the canvas  ->  a token for each masked position of the block, and how sure
        commit the surest positions; what is committed stays

Blocks are filled from left to right, positions within a block in the order of confidence
(unmask_order.py). Every random choice depends on a row's seed, its step and the position in the
row, never on the other rows; each row goes at its own pace and leaves when it is full.

Legend: B rows, A rows that are not full, T columns, W columns of their blocks, N places that are
decided about, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.models.masked_diffusion import Canvas, MaskedModel
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.unmask_order import ORDERS, Proposal, due, propose, quota, surest

MAX_EDIT_STEPS = 16  # of a block, once it is full
NEVER_FIRST = torch.finfo(torch.float32).min  # below every confidence, above what is not there


@dataclass(frozen=True, slots=True)
class UnmaskParams:
    """How a canvas is filled. `steps` are those of a block of `block_size` positions (0: the whole
    canvas is one block), shared out evenly; `temperature` 0 takes the likeliest token. A model with
    blocks of its own is filled by those, and takes 0 or their size. The options are those of
    `config.DiffusionConfig`; `eos_ids` are what its `eos_` options mean."""

    steps: int
    block_size: int = 0
    temperature: float = 0.0
    order: str = "low_confidence"
    top_p: float = 1.0
    top_k: int = 0
    threshold: float | None = None
    factor: float | None = None
    cfg_scale: float = 0.0
    edit_threshold: float | None = None
    suppress_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    eos_confidence: bool = True
    eos_early_stop: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Unmasked:
    """A filled canvas, and how it came about. Positions that were not masked have step -1, and 0
    for the rest; so do those that `eos_early_stop` filled."""

    ids_BT: Tensor  # int64, without a mask
    step_BT: Tensor  # int64: the step, from 0 and over all blocks, that committed the token
    logp_BT: Tensor  # float32: its log-prob then, at the sampling temperature (1 where that is 0)
    confidence_BT: Tensor  # float32: what its turn was decided by
    forwards_B: Tensor  # int64: steps that the row took part in


@torch.no_grad()
def unmask(
    model: MaskedModel, canvas: Canvas, params: UnmaskParams, seed_B: Tensor, *, start: int = 0
) -> Unmasked:
    """Fill every masked, real position of `canvas`; `seed_B` are int64. A row without a mask costs
    nothing and comes back as it is. Blocks are counted from column `start`, those of a model with
    blocks from a row's first token. EngineError for logits that are not finite."""
    _check(model, params)
    filling = _Filling(model, canvas, params, seed_B, start)
    while len(rows_A := filling.advance()):
        filling.step(rows_A)
    return Unmasked(
        filling.ids_BT,
        filling.step_BT,
        filling.logp_BT,
        filling.confidence_BT,
        filling.forwards_B,
    )


class _Filling:
    """A canvas that is being filled."""

    def __init__(
        self, model: MaskedModel, canvas: Canvas, params: UnmaskParams, seed_B: Tensor, start: int
    ) -> None:
        self.model, self.canvas, self.params, self.seed_B = model, canvas, params, seed_B
        self.ids_BT = canvas.ids_BT.clone()
        real_BT = canvas.real_BT
        if real_BT is None:
            real_BT = torch.ones_like(self.ids_BT, dtype=torch.bool)
        self.masked_BT = (self.ids_BT == model.mask_id) & real_BT
        self.free_BT = self.masked_BT.clone()  # not given
        self.position_BT = (real_BT.long().cumsum(1) - 1).clamp(min=0)
        self.block_BT = self._blocks(start)
        self.step_BT = torch.full_like(self.ids_BT, -1)
        self.logp_BT = torch.zeros(self.ids_BT.shape, device=self.ids_BT.device)
        self.confidence_BT = torch.zeros_like(self.logp_BT)
        self.forwards_B = torch.zeros_like(seed_B)
        self.front_B = torch.full_like(seed_B, torch.iinfo(torch.int64).min)  # block being filled
        self.size_B = torch.zeros_like(seed_B)  # its masked positions when it began
        self.done_B = torch.zeros_like(seed_B)  # its steps until now

    def _blocks(self, start: int) -> Tensor:
        """The number of each position's block."""
        if self.model.block_size:
            return self.position_BT // self.model.block_size
        column_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        size = self.params.block_size or max(1, self.ids_BT.shape[1])
        if not self.params.block_size:
            return torch.zeros_like(self.ids_BT)
        return ((column_T - start) // size).expand_as(self.ids_BT)

    def advance(self) -> Tensor:
        """The rows that are not full, int64 [A], each with its next block begun."""
        last = torch.iinfo(torch.int64).max
        front_B = self.block_BT.masked_fill(~self.masked_BT, last).amin(1)
        entered_B = front_B != self.front_B
        size_B = (self.masked_BT & (self.block_BT == front_B[:, None])).sum(1)
        self.size_B = torch.where(entered_B, size_B, self.size_B)
        self.done_B = torch.where(entered_B, 0, self.done_B)
        self.front_B = front_B
        return (front_B < last).nonzero()[:, 0]

    def step(self, rows_A: Tensor) -> None:
        """One forward pass, and what it decides."""
        wanted_AT = self.masked_BT[rows_A] & (self.block_BT[rows_A] == self.front_B[rows_A, None])
        columns = wanted_AT.any(0).nonzero()[:, 0]
        low, high = int(columns[0]), int(columns[-1]) + 1
        wanted_AW = wanted_AT[:, low:high]
        logits_AWV = self._logits(rows_A, low, high)
        at_A, at_W = wanted_AW.nonzero(as_tuple=True)
        row_N, column_N = rows_A[at_A], at_W + low
        found = self._propose(logits_AWV[at_A, at_W], row_N, column_N)
        confidence_AW = torch.zeros(wanted_AW.shape, device=wanted_AW.device)
        confidence_AW[at_A, at_W] = found.confidence_N
        chosen_N = self._chosen(rows_A, confidence_AW, wanted_AW)[at_A, at_W]
        self._commit(found, row_N, column_N, chosen_N)
        self.forwards_B[rows_A] += 1
        self.done_B[rows_A] += 1

    def _logits(self, rows_A: Tensor, low: int, high: int) -> Tensor:
        """Of columns `low` to `high`: [A, W, V], guided, without what is suppressed."""
        canvas = self.canvas.with_ids(self.ids_BT).rows(rows_A)
        return self.model.logits(canvas, low, high)

    def _propose(self, logits_NV: Tensor, row_N: Tensor, column_N: Tensor) -> Proposal:
        params = self.params
        position_N = self.position_BT[row_N, column_N]
        sampling = SamplingParams(1, params.temperature, params.top_p, params.top_k)
        found = propose(
            logits_NV,
            self.seed_B[row_N],
            self.forwards_B[row_N],
            position_N,
            sampling,
            params.order,
        )
        if bool(found.logp_N.isnan().any()):
            raise EngineError(
                "the model's logits are not finite, so nothing can be sampled from it: the weights "
                "diverged. Go back to an earlier checkpoint and lower the learning rate."
            )
        return found

    def _chosen(self, rows_A: Tensor, confidence_AW: Tensor, wanted_AW: Tensor) -> Tensor:
        """Which positions are committed: bool [A, W]."""
        params = self.params
        if params.order == "origin":
            quota_A = due(confidence_AW, wanted_AW, params.steps)
        else:
            done_A, size_A = self.done_B[rows_A], self.size_B[rows_A]
            quota_A = quota(params.order, done_A, params.steps, size_A, wanted_AW.sum(1))
        return surest(confidence_AW, wanted_AW, quota_A, params.threshold, params.factor)

    def _commit(self, found: Proposal, row_N: Tensor, column_N: Tensor, chosen_N: Tensor) -> None:
        place = row_N[chosen_N], column_N[chosen_N]
        self.ids_BT[place] = found.token_N[chosen_N]
        self.logp_BT[place] = found.logp_N[chosen_N]
        self.confidence_BT[place] = found.confidence_N[chosen_N]
        self.step_BT[place] = self.forwards_B[place[0]]
        self.masked_BT[place] = False


def _check(model: MaskedModel, params: UnmaskParams) -> None:
    if params.steps < 1:
        raise EngineError(f"steps is {params.steps}; a block takes at least 1")
    if params.order not in ORDERS:
        raise EngineError(f"order {params.order!r} is unknown; it is one of {', '.join(ORDERS)}")
    if model.block_size and params.block_size not in (0, model.block_size):
        raise EngineError(
            f"block_size {params.block_size}: the model's own blocks have {model.block_size} "
            "positions; leave it out"
        )
