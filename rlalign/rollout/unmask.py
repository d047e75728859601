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
    raise NotImplementedError
