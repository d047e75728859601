"""Filling a canvas: which masked positions are decided at a step, and with which tokens.

    while a position of the block is masked:
        logits of the canvas  ->  a token for each masked position of the block, and how sure
        commit the surest positions; what is committed stays

Blocks are filled from left to right, positions within a block in the order of confidence. Every
random choice depends on a row's seed, its step and the position, never on the other rows.

Legend: B rows, T columns, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.models.masked_diffusion import Canvas, MaskedModel
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.sampling import sample


@dataclass(frozen=True, slots=True)
class UnmaskParams:
    """How a canvas is filled. `steps` are those of a block of `block_size` positions (0: the whole
    canvas is one block), shared out evenly; `temperature` 0 takes the likeliest token."""

    steps: int
    block_size: int = 0
    temperature: float = 0.0
    order: str = "low_confidence"


@dataclass(frozen=True, slots=True, eq=False)
class Unmasked:
    """A filled canvas, and how it came about. Positions that were not masked have step -1, and 0
    for the rest."""

    ids_BT: Tensor  # int64, without a mask
    step_BT: Tensor  # int64: the step, from 0 and over all blocks, that committed the token
    logp_BT: Tensor  # float32: its log-prob then, at the sampling temperature (1 where that is 0)
    confidence_BT: Tensor  # float32: what its turn was decided by
    forwards_B: Tensor  # int64: steps that the row took part in


@torch.no_grad()
def unmask(model: MaskedModel, canvas: Canvas, params: UnmaskParams, seed_B: Tensor) -> Unmasked:
    """Fill every masked, real position of `canvas`; `seed_B` are int64. A row without a mask costs
    nothing and comes back as it is."""
    ids_BT = canvas.ids_BT.clone()
    masked_BT = ids_BT == model.mask_id
    if canvas.real_BT is not None:
        masked_BT &= canvas.real_BT
    out = Unmasked(
        ids_BT,
        torch.where(masked_BT, 0, -1),
        torch.zeros(ids_BT.shape, device=ids_BT.device),
        torch.zeros(ids_BT.shape, device=ids_BT.device),
        torch.zeros(len(ids_BT), dtype=torch.int64, device=ids_BT.device),
    )
    length = ids_BT.shape[1]
    for start in range(0, length, params.block_size or length):
        stop = min(start + (params.block_size or length), length)
        for left in range(params.steps, 0, -1):
            row_N = masked_BT[:, start:stop].any(1).nonzero()[:, 0]
            if len(row_N):
                _step(model, canvas, params, seed_B, out, masked_BT, row_N, (start, stop), left)
    return out


def _step(
    model: MaskedModel,
    canvas: Canvas,
    params: UnmaskParams,
    seed_B: Tensor,
    out: Unmasked,
    masked_BT: Tensor,
    row_N: Tensor,
    block: tuple[int, int],
    left: int,
) -> None:
    """One step of rows `row_N`, in place: ceil(masked / steps left) positions of the block each."""
    start, stop = block
    logits_NLV = model.logits(canvas.with_ids(out.ids_BT).rows(row_N), start, stop)
    step_N = out.forwards_B[row_N]
    place_L = torch.arange(start, stop, device=row_N.device)
    count_NL = step_N[:, None] * masked_BT.shape[1] + place_L
    token, logp = sample(
        logits_NLV.flatten(0, 1),
        seed_B[row_N].repeat_interleave(stop - start),
        count_NL.flatten(),
        SamplingParams(1, temperature=params.temperature),
    )
    token_NL, logp_NL = token.view(count_NL.shape), logp.view(count_NL.shape)
    masked_NL = masked_BT[row_N, start:stop]
    sure_NL = logp_NL.exp().masked_fill(~masked_NL, -1)
    num_N1 = -(-masked_NL.sum(1, keepdim=True) // left)
    rank_NL = sure_NL.argsort(dim=1, descending=True, stable=True).argsort(1)
    row_M, column_M = (masked_NL & (rank_NL < num_N1)).nonzero(as_tuple=True)
    at = row_N[row_M], column_M + start
    out.ids_BT[at] = token_NL[row_M, column_M]
    out.step_BT[at] = step_N[row_M]
    out.logp_BT[at] = logp_NL[row_M, column_M]
    out.confidence_BT[at] = sure_NL[row_M, column_M]
    masked_BT[at] = False
    out.forwards_B[row_N] += 1
