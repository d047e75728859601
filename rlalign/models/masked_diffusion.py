"""Masked-diffusion models: the contract that samplers, likelihoods and searches rely on.

Such a model reads a canvas, tokens of which some are the mask, and says for every position which
token belongs there. It knows no time and no order: whatever is masked, in whatever pattern, is
predicted from all that is not. A language model is one (`MaskedDiffusionLM`), and so is any network
with the method `logits` of `MaskedModel`, such as the planner of models/planner.py.

Legend: B rows, T columns of a canvas, M places asked for, V vocabulary (the mask token included).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.config.schema import KernelsConfig
from rlalign.models.head import build_head
from rlalign.models.lora import save_weights


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """Rows that a model reads. `real_BT` is False at padding, which nobody sees (None: there is
    none). `cond` is whatever else the model reads, a row of each tensor for a row of the canvas.

    >>> # mask token 9: a prompt of 2 and 3 places to fill; a prompt of 1, padded on the left
    >>> # ids_BT=[[4, 7, 9, 9, 9], [0, 5, 9, 9, 9]], real_BT=[[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    """

    ids_BT: Tensor  # int64
    real_BT: Tensor | None = None  # bool
    cond: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.ids_BT)

    def with_ids(self, ids_BT: Tensor) -> Canvas:
        return replace(self, ids_BT=ids_BT)

    def rows(self, index_B: Tensor) -> Canvas:
        """The canvas of rows `index_B`, which may repeat."""
        cond = self.cond and {name: value[index_B] for name, value in self.cond.items()}
        real_BT = None if self.real_BT is None else self.real_BT[index_B]
        return Canvas(self.ids_BT[index_B], real_BT, cond)


class MaskedModel(Protocol):
    """What can fill a canvas."""

    mask_id: int
    vocab_size: int
    block_size: int  # 0: every position sees every other; else no position sees a later block

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> Tensor:
        """Of the tokens in columns `start` to `stop`: float32 [B, stop - start, V]. The mask token,
        which is no answer, has -inf. A row depends on that row alone."""
        ...


class MaskedDiffusionLM(nn.Module):
    """A transformer of Hugging Face as a masked-diffusion model.

    `shift`: the logits of column i - 1 are those of token i (Dream), column 0's its own.
    `block_size`: attention is causal between blocks of that many positions (SDAR), counted from a
    row's first token; 0: full. The head is run without its logits where only log-probs are wanted
    (kernels/linear_logprob.py).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_id: int,
        *,
        shift: bool = False,
        block_size: int = 0,
        kernels: KernelsConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.mask_id, self.shift, self.block_size = mask_id, shift, block_size
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.head = build_head(model, kernels or KernelsConfig())

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> Tensor:
        """As `MaskedModel` says."""
        stop = canvas.ids_BT.shape[1] if stop is None else stop
        hidden_BTD = self._hidden(canvas)
        columns = self._sources(torch.arange(start, stop, device=hidden_BTD.device))
        output = self.model.get_output_embeddings()
        logits_BTV = output(hidden_BTD[:, columns]).float()
        return _without_mask(logits_BTV, self.mask_id)

    def logp(
        self, canvas: Canvas, row_M: Tensor, column_M: Tensor, target_M: Tensor, temperature: float
    ) -> Tensor:
        """Log-prob, float32 [M], of token `target_M` at the given places of the canvas."""
        hidden_BTD = self._hidden(canvas)
        hidden_MD = hidden_BTD[row_M, self._sources(column_M)]
        return self.head(hidden_MD, target_M, temperature).logp

    def _hidden(self, canvas: Canvas) -> Tensor:
        """Final hidden states [B, T, D]."""
        ids_BT, real_BT = canvas.ids_BT, canvas.real_BT
        if real_BT is None:
            output = self.model.base_model(input_ids=ids_BT, use_cache=False)
            return output.last_hidden_state
        position_BT = (real_BT.long().cumsum(1) - 1).clamp(min=0)
        output = self.model.base_model(
            input_ids=ids_BT,
            attention_mask=real_BT.long(),
            position_ids=position_BT,
            use_cache=False,
        )
        return output.last_hidden_state

    def _sources(self, column: Tensor) -> Tensor:
        """The columns whose hidden states predict the tokens of `column`."""
        return (column - 1).clamp(min=0) if self.shift else column

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an HF folder that `masked_load.load_masked_lm` reads; adapters merged."""
        config: Any = self.model.config
        config.mask_token_id, config.diffusion_shift = self.mask_id, self.shift
        config.diffusion_block_size = self.block_size
        save_weights(self.model, Path(folder))


def _without_mask(logits_BTV: Tensor, mask_id: int) -> Tensor:
    logits_BTV[..., mask_id] = -torch.inf
    return logits_BTV
