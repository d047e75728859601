"""A Sudoku model without training: a digit is the less likely the more visible peers hold it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.models.masked_diffusion import Canvas
from rlalign.tasks.sudoku import BLANK


class RulesModel:
    """Exact about what is visible, blind to what is decided beside it in the same step."""

    block_size, vocab_size, mask_id = 0, 5, BLANK

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> Tensor:
        cell = torch.arange(16)
        row, column = cell // 4, cell % 4
        box = row // 2 * 2 + column // 2
        peers = sum((place[:, None] == place).float() for place in (row, column, box)) > 0
        digit_BTD = torch.nn.functional.one_hot(canvas.ids_BT, 5)[..., :4].float()
        logits = -3.0 * (peers.float() @ digit_BTD) - 0.1 * torch.arange(4.0)
        return torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)[:, start:stop]
