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
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.config.schema import KernelsConfig, LoraConfig
from rlalign.kernels.linear_logprob import LinearLogProb, linear_logprob
from rlalign.models.errors import ModelError
from rlalign.models.head import LoraLinearLogProb, build_head
from rlalign.models.lora import attach_lora, merged_weights, save_weights
from rlalign.models.masked_attention import KV, blocks_end, sources, whole_blocks
from rlalign.models.masked_layout import Layout
from rlalign.models.masked_networks import DECODERS, Decoder, Encoder


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

    `shift`: the logits of a token stand one column earlier, the first token's at its own (Dream).
    `block_size`: attention is causal between blocks of that many positions (SDAR), counted from a
    row's first token; 0: full. `layout`: how a checkpoint of another project is written back. The
    head is run without its logits where only log-probs are wanted (kernels/linear_logprob.py).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_id: int,
        *,
        shift: bool = False,
        block_size: int = 0,
        kernels: KernelsConfig | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Raises ModelError for a model that cannot be run so: a mask token outside of its
        vocabulary, blocks in an encoder, a causal one."""
        super().__init__()
        self.model = model
        self.mask_id, self.shift, self.block_size = mask_id, shift, block_size
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._kernels, self._layout = kernels or KernelsConfig(), layout
        self._network = self._make_network()
        self.head = self._make_head()

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> Tensor:
        """As `MaskedModel` says."""
        column_BT = self._sources(canvas)[:, start:stop]
        states_BTD = self._network.states(canvas.ids_BT, canvas.real_BT)
        return self._to_logits(_take(states_BTD, column_BT))

    def logp(
        self, canvas: Canvas, row_M: Tensor, column_M: Tensor, target_M: Tensor, temperature: float
    ) -> Tensor:
        """Log-prob, float32 [M], of token `target_M` at the given places of the canvas, among all
        tokens but the mask. Raises ModelError where an adapter was put on the head behind this
        object's back."""
        states_BTD = self._network.states(canvas.ids_BT, canvas.real_BT)
        column_M = self._sources(canvas).expand(len(canvas), -1)[row_M, column_M]
        states_MD = states_BTD[row_M, column_M]
        if self.head is None:
            logp_MV = (self._to_logits(states_MD) / temperature).log_softmax(-1)
            return logp_MV.gather(1, target_M[:, None])[:, 0]
        self._refuse_unknown_adapter()
        score = partial(logprob_without, self.mask_id)
        return self.head(states_MD, target_M, temperature, function=score)

    def prefill(self, canvas: Canvas, stop: int, kv: KV | None = None) -> KV:
        """Keys and values of the canvas's first columns, for `logits_cached`.

        With full attention: the whole canvas is run once, and columns 0 to `stop` are kept; they
        are stale as soon as any token changes. With blocks: exact as long as the tokens before
        `stop` stay; only columns after those of `kv` are run, and those of blocks that are not
        complete at `stop` are left out, so fewer than `stop` may be kept.
        Raises ModelError for a model that has none.
        """
        network = self._caching()
        if not self.block_size:
            _, whole = network.cached(canvas.ids_BT, canvas.real_BT, KV(), canvas.ids_BT.shape[1])
            return whole.columns(stop)
        kv = kv or KV()
        kept = whole_blocks(_real(canvas), self.block_size, stop)
        if kept <= len(kv):
            return kv
        _, longer = network.cached(canvas.ids_BT, canvas.real_BT, kv, stop)
        return longer.columns(kept)

    def logits_cached(self, canvas: Canvas, kv: KV, start: int, stop: int | None = None) -> Tensor:
        """`logits` of columns `start` to `stop`, float32 [B, stop - start, V], without a gradient:
        columns that `kv` holds are not run again, nor, with blocks, those that nobody asked for
        sees. Rows of `kv` are the canvas's."""
        network = self._caching()
        stop = canvas.ids_BT.shape[1] if stop is None else stop
        column_BT = self._sources(canvas)[:, start:stop]
        begin = min(len(kv), int(column_BT.min()))
        end = canvas.ids_BT.shape[1]
        if self.block_size:
            end = blocks_end(_real(canvas), self.block_size, stop)
        states_BTD, _ = network.cached(canvas.ids_BT, canvas.real_BT, kv.columns(begin), end)
        return self._to_logits(_take(states_BTD, column_BT - begin)).detach()

    def attach_lora(self, config: LoraConfig, seed: int) -> None:
        """models/lora.py's, and the head follows. Raises ModelError as that does."""
        attach_lora(self.model, config, seed)
        self.head = self._make_head()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an HF folder that `masked_load.load_masked_lm` reads, adapters merged: one of
        transformers' own, or in the layout of the checkpoint that was loaded."""
        config: Any = self.model.config
        if self._layout is not None:
            weights = merged_weights(self.model)
            self._layout.save(weights, Path(folder), self.mask_id, self.block_size)
            return
        config.mask_token_id, config.diffusion_shift = self.mask_id, self.shift
        config.diffusion_block_size = self.block_size
        save_weights(self.model, Path(folder))

    def _make_network(self) -> Decoder | Encoder:
        name = type(self.model).__name__
        if not 0 <= self.mask_id < self.vocab_size:
            raise ModelError(
                f"the mask token {self.mask_id} is not in the vocabulary of {name}, which has "
                f"{self.vocab_size} tokens: set mask_token_id in config.json"
            )
        if self.model.config.model_type in DECODERS:
            return Decoder(self.model, self.block_size)
        if self.block_size:
            raise ModelError(
                f"{name} cannot attend by blocks of {self.block_size}, only {', '.join(DECODERS)} "
                "can: set diffusion_block_size to 0 in config.json"
            )
        return Encoder(self.model)

    def _make_head(self) -> LinearLogProb | None:
        if isinstance(self._network, Encoder) and not self._network.linear:
            return None
        return build_head(self.model, self._kernels)

    def _refuse_unknown_adapter(self) -> None:
        adapted = isinstance(self.model.get_output_embeddings(), BaseTunerLayer)
        if adapted != isinstance(self.head, LoraLinearLogProb):
            raise ModelError(
                "an adapter was put on the output head after this model was built, and its "
                "log-probs would not follow it: use MaskedDiffusionLM.attach_lora"
            )

    def _caching(self) -> Decoder:
        if isinstance(self._network, Decoder):
            return self._network
        raise ModelError(
            f"{type(self.model).__name__} keeps no keys and values: sample without a cache"
        )

    def _sources(self, canvas: Canvas) -> Tensor:
        """[B or 1, T]: the column whose logits are those of each token."""
        if self.shift:
            return sources(_real(canvas))
        return torch.arange(canvas.ids_BT.shape[1], device=canvas.ids_BT.device)[None]

    def _to_logits(self, states: Tensor) -> Tensor:
        output: Any = self.model.get_output_embeddings()
        logits = (states if self.head is None else output(states)).float()
        logits[..., self.mask_id] = -torch.inf
        return logits


def logprob_without(
    token: int,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """`linear_logprob(...).logp` of a vocabulary without `token`: that has a bias of -inf."""
    if bias is None:
        bias = weight.new_zeros(len(weight))
    at = torch.arange(len(weight), device=weight.device) == token
    bias = bias.masked_fill(at, -torch.inf)
    return linear_logprob(hidden, weight, target, bias=bias, **options).logp


def _real(canvas: Canvas) -> Tensor:
    """[B, T], or [1, T] where nothing is padding."""
    if canvas.real_BT is None:
        return torch.ones_like(canvas.ids_BT[:1], dtype=torch.bool)
    return canvas.real_BT


def _take(states_BTD: Tensor, column_BS: Tensor) -> Tensor:
    """[B, S, D]: the given columns of each row."""
    if len(column_BS) == 1:
        return states_BTD[:, column_BS[0]]
    return states_BTD.gather(1, column_BS[..., None].expand(-1, -1, states_BTD.shape[-1]))
