"""Filling a canvas: which masked positions are decided at a step, and with which tokens.

    while a position of the block is masked:
        logits of the canvas  ->  a token for each masked position of the block, and how sure
        commit the surest positions; what is committed stays

Blocks are filled from left to right, positions within a block in the order of confidence
(unmask_order.py). Every random choice depends on a row's seed, its step and the position in the
row, never on the other rows; each row goes at its own pace and leaves when it is full. With a
cache of keys and values (unmask_logits.py) rows leave when a block is, and wait for the next.

Legend: B rows, A rows that are not full, T columns, W columns of their blocks, N places that are
decided about, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.models.masked_diffusion import Canvas, MaskedModel
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.unmask_logits import Reader, Span
from rlalign.rollout.unmask_order import (
    ORDERS,
    PROBABILITIES,
    SCHEDULED,
    Proposal,
    due,
    propose,
    quota,
    surest,
)

LOGITS_BYTES = 512 * 2**20  # that exist at once, or those of one row
MAX_EDIT_STEPS = 16  # of a block, once it is full
DECIDED_LAST = torch.finfo(torch.float32).min  # below every confidence, above -inf: not there
NO_BLOCK = 2**62  # behind every block


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
    cache: str = "none"
    alg_temp: float = 0.0


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
    while len(rows_A := filling.together(filling.advance())):
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
        self.params, self.seed_B, self.vocab = params, seed_B, model.vocab_size
        self.ids_BT = canvas.ids_BT.clone()
        real_BT = canvas.real_BT
        if real_BT is None:
            real_BT = torch.ones_like(self.ids_BT, dtype=torch.bool)
        self.position_BT = (real_BT.long().cumsum(1) - 1).clamp(min=0)
        self.masked_BT = (self.ids_BT == model.mask_id) & real_BT
        self.free_BT = self.masked_BT.clone()  # not given
        self.block_BT = self._blocks(model.block_size, start).masked_fill(~self.free_BT, NO_BLOCK)
        self.reader = Reader(
            model,
            canvas,
            self.free_BT,
            cfg_scale=params.cfg_scale,
            suppress_ids=params.suppress_ids,
            cache=params.cache,
        )
        self.begun = -NO_BLOCK  # the block that a cache was made for
        self.eos_ids = torch.tensor(params.eos_ids, dtype=torch.long, device=seed_B.device)
        self.step_BT = torch.full_like(self.ids_BT, -1)
        self.logp_BT = torch.zeros(self.ids_BT.shape, device=self.ids_BT.device)
        self.confidence_BT = torch.zeros_like(self.logp_BT)
        self.forwards_B = torch.zeros_like(seed_B)
        self.front_B = torch.full_like(seed_B, -NO_BLOCK)  # the block that is being filled
        self.size_B = torch.zeros_like(seed_B)  # its masked positions when it began
        self.done_B = torch.zeros_like(seed_B)  # its steps until now
        self.extra_B = torch.zeros_like(seed_B)  # and those of them since it is full
        self.edited_B = torch.ones_like(seed_B, dtype=torch.bool)  # at its last step

    def _blocks(self, own_size: int, start: int) -> Tensor:
        """The number of each position's block, int64 [B, T]."""
        if own_size:
            # Numbered from the first one with a mask: rows whose prompts differ keep step.
            block_BT = self.position_BT // own_size
            return block_BT - block_BT.masked_fill(~self.free_BT, NO_BLOCK).amin(1, keepdim=True)
        if not self.params.block_size:
            return torch.zeros_like(self.ids_BT)
        column_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        return ((column_T - start) // self.params.block_size).expand_as(self.ids_BT)

    def advance(self) -> Tensor:
        """The rows that are not finished, int64 [A], each with its next block begun."""
        front_B = self._front()
        editing_B = torch.zeros_like(self.edited_B)
        if self.params.edit_threshold is not None:
            begun_B = (self.done_B > 0) & (front_B > self.front_B)
            editing_B = begun_B & self.edited_B & (self.extra_B < MAX_EDIT_STEPS)
        if self.params.eos_early_stop:
            self._stop_early((front_B > self.front_B) & ~editing_B)
            front_B = self._front()
        front_B = torch.where(editing_B, self.front_B, front_B)
        entered_B = front_B != self.front_B
        size_B = (self.masked_BT & (self.block_BT == front_B[:, None])).sum(1)
        self.size_B = torch.where(entered_B, size_B, self.size_B)
        for count_B in (self.done_B, self.extra_B):
            count_B.masked_fill_(entered_B, 0)
        self.edited_B |= entered_B
        self.front_B = front_B
        return (front_B < NO_BLOCK).nonzero()[:, 0]

    def together(self, rows_C: Tensor) -> Tensor:
        """Those of the rows that take the next step. A cache is of one block, so with one the rows
        wait for each other at its end."""
        if self.params.cache == "none" or not len(rows_C):
            return rows_C
        front = int(self.front_B[rows_C].min())
        rows_A = rows_C[self.front_B[rows_C] == front]
        if front != self.begun:
            self.begun = front
            masked_T = self.masked_BT[rows_C].any(0)
            columns = (self.block_BT[rows_A] == front).any(0).nonzero()[:, 0].tolist()
            final = int(masked_T.long().argmax())
            self.reader.begin(self.ids_BT, Span(columns[0], columns[-1] + 1, rows_C, final))
        return rows_A

    def _front(self) -> Tensor:
        """The first block of each row that has a masked position."""
        return self.block_BT.masked_fill(~self.masked_BT, NO_BLOCK).amin(1)

    def _stop_early(self, leaving_B: Tensor) -> None:
        """Of the rows that leave a block, fill those that have an end token with it."""
        ended_BT = self.free_BT & ~self.masked_BT & torch.isin(self.ids_BT, self.eos_ids)
        filled_BT = self.masked_BT & (leaving_B & ended_BT.any(1))[:, None]
        first_B1 = ended_BT.long().argmax(1, keepdim=True)
        self.ids_BT = torch.where(filled_BT, self.ids_BT.gather(1, first_B1), self.ids_BT)
        self.masked_BT &= ~filled_BT

    def step(self, rows_A: Tensor) -> None:
        """One forward pass, and what it decides."""
        own_AT = self.block_BT[rows_A] == self.front_B[rows_A, None]
        masked_AT = self.masked_BT[rows_A] & own_AT
        open_AT = masked_AT if self.params.edit_threshold is None else own_AT
        columns = open_AT.any(0).nonzero()[:, 0]
        low, high = int(columns[0]), int(columns[-1]) + 1
        open_AW = open_AT[:, low:high]
        at_A, at_W = open_AW.nonzero(as_tuple=True)
        row_N, column_N = rows_A[at_A], at_W + low
        found = self._read(rows_A, open_AW, low)
        confidence_AW = torch.zeros(open_AW.shape, device=open_AW.device)
        confidence_AW[at_A, at_W] = found.confidence_N
        chosen_AW = self._chosen(rows_A, confidence_AW, masked_AT[:, low:high])
        chosen_N = chosen_AW[at_A, at_W]
        if self.params.edit_threshold is not None:
            chosen_N |= self._edits(found, rows_A, row_N, column_N, self.params.edit_threshold)
        self._commit(found, row_N[chosen_N], column_N[chosen_N], chosen_N)
        self.forwards_B[rows_A] += 1
        self.done_B[rows_A] += 1

    def _read(self, rows_A: Tensor, open_AW: Tensor, low: int) -> Proposal:
        """What the open places would take, in their order; rows whose logits fit go together."""
        width = open_AW.shape[1]
        count = max(1, LOGITS_BYTES // (4 * width * self.vocab))
        parts = []
        for rows_a, open_aW in zip(rows_A.split(count), open_AW.split(count), strict=True):
            logits_aWV = self.reader.logits(self.ids_BT, rows_a, low, low + width)
            at_a, at_W = open_aW.nonzero(as_tuple=True)
            parts.append(self._propose(logits_aWV[at_a, at_W], rows_a[at_a], at_W + low))
        return Proposal(*map(torch.cat, zip(*parts, strict=True)))

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
        if not params.eos_confidence:
            found.confidence_N[torch.isin(found.token_N, self.eos_ids)] = DECIDED_LAST
        return found

    def _chosen(self, rows_A: Tensor, confidence_AW: Tensor, masked_AW: Tensor) -> Tensor:
        """Which masked positions are committed: bool [A, W]."""
        params = self.params
        if params.order == "origin":
            quota_A = due(confidence_AW, masked_AW, params.steps)
        else:
            done_A, size_A = self.done_B[rows_A], self.size_B[rows_A]
            quota_A = quota(params.order, done_A, params.steps, size_A, masked_AW.sum(1))
        return surest(confidence_AW, masked_AW, quota_A, params.threshold, params.factor)

    def _edits(
        self, found: Proposal, rows_A: Tensor, row_N: Tensor, column_N: Tensor, threshold: float
    ) -> Tensor:
        """Which decided positions take another token: bool [N]; counts the steps of full blocks."""
        place = row_N, column_N
        edited_N = ~self.masked_BT[place] & (found.token_N != self.ids_BT[place])
        edited_N &= found.prob_N > threshold
        masked_N = self.masked_BT[place]
        full_B = torch.ones_like(self.edited_B).index_fill_(0, row_N[masked_N], False)
        self.extra_B[rows_A] += full_B[rows_A].long()
        self.edited_B[rows_A] = ~full_B[rows_A]
        self.edited_B[row_N[edited_N]] = True
        return edited_N

    def _commit(self, found: Proposal, row_M: Tensor, column_M: Tensor, chosen_N: Tensor) -> None:
        self.ids_BT[row_M, column_M] = found.token_N[chosen_N]
        self.logp_BT[row_M, column_M] = found.logp_N[chosen_N]
        self.confidence_BT[row_M, column_M] = found.confidence_N[chosen_N]
        self.step_BT[row_M, column_M] = self.forwards_B[row_M]
        self.masked_BT[row_M, column_M] = False


def _check(model: MaskedModel, params: UnmaskParams) -> None:
    if params.steps < 1:
        raise EngineError(f"steps is {params.steps}; a block takes at least 1")
    if params.order not in ORDERS:
        raise EngineError(f"order {params.order!r} is unknown; it is one of {', '.join(ORDERS)}")
    if params.order not in PROBABILITIES and _parallel(params):
        raise EngineError(
            f"threshold and factor compare confidences with a probability, and order="
            f"{params.order} has none: use {', '.join(PROBABILITIES)}"
        )
    if params.alg_temp and (params.order not in SCHEDULED or _parallel(params)):
        raise EngineError(
            f"alg_temp draws positions in Dream's orders, {', '.join(SCHEDULED)}, without "
            f"threshold and factor; order={params.order}: leave it out"
        )
    if params.order == "origin" and not params.eos_confidence:
        raise EngineError(
            "eos_confidence=False makes end tokens wait, and with order=origin a position's turn "
            "is drawn before its token: leave one of them out"
        )
    if model.block_size and params.block_size not in (0, model.block_size):
        raise EngineError(
            f"block_size {params.block_size}: the model's own blocks have {model.block_size} "
            "positions; leave it out"
        )


def _parallel(params: UnmaskParams) -> bool:
    return params.threshold is not None or params.factor is not None
