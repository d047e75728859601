"""The logits that a sampler of a masked-diffusion model decides by.

    guided   un + (s + 1) (cond - un)       un: the same canvas with all that was given masked

Source of the guidance: LLaDA (arXiv 2502.09992). It holds before temperature and confidence.

Legend: B rows, A rows that are asked for, T columns, W columns asked for, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.models.masked_diffusion import Canvas, MaskedModel


class Reader:
    """Reads a canvas as it is filled. `free_BT` says what is filled, the rest was given."""

    def __init__(
        self,
        model: MaskedModel,
        canvas: Canvas,
        free_BT: Tensor,
        cfg_scale: float,
        suppress_ids: tuple[int, ...],
    ) -> None:
        self._model, self._canvas, self._free_BT = model, canvas, free_BT
        self._cfg_scale = cfg_scale
        banned = [model.mask_id, *suppress_ids]
        self._banned = torch.tensor(banned, device=free_BT.device)
        self._plain = not (cfg_scale or suppress_ids)

    def logits(self, ids_BT: Tensor, rows_A: Tensor, low: int, high: int) -> Tensor:
        """Of columns `low` to `high` of the given rows: float32 [A, W, V], guided, -inf at the mask
        token and what is suppressed."""
        logits_AWV = self._read(ids_BT, rows_A, low, high)
        if self._cfg_scale:
            bare_BT = torch.where(self._free_BT, ids_BT, self._model.mask_id)
            bare_AWV = self._read(bare_BT, rows_A, low, high)
            logits_AWV = bare_AWV + (self._cfg_scale + 1) * (logits_AWV - bare_AWV)
        if self._plain:
            return logits_AWV
        return logits_AWV.index_fill(-1, self._banned, -torch.inf)  # the mask: no -inf minus -inf

    def _read(self, ids_BT: Tensor, rows_A: Tensor, low: int, high: int) -> Tensor:
        return self._model.logits(self._canvas.with_ids(ids_BT).rows(rows_A), low, high)
