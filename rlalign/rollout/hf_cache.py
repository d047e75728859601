"""Decoding with any causal LM of transformers: its own forward pass over a preallocated cache.

Prompts are padded on the left, so that all rows write the same cache column; the attention mask
hides the padding and position ids count from each row's first token. So rows only enter together.

Shapes: B rows, T columns of the cache, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

GROWTH = 64  # columns added at least when the cache is full


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one full-attention layer, written in place; `keys` and `values` are views
    of the columns in use. transformers' own DynamicLayer copies the whole cache at every token."""

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [state[:, :, :0] for state in (key_states, value_states)]
        self.keys, self.values = self._buffers
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, start = len(key_states), self.get_seq_length()
        end = start + key_states.shape[2]
        for i, state in enumerate((key_states, value_states)):
            if end > self._buffers[i].shape[2]:
                self._buffers[i] = _grown(self._buffers[i][:rows, :, :start], state, end)
            self._buffers[i][:rows, :, start:end] = state
        self._show(rows, end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; more or fewer rows than before are fine."""
        if not self.is_initialized:
            return
        length = self.get_seq_length()
        rows = len(beam_idx)
        for i, buffer in enumerate(self._buffers):
            if rows > len(buffer):
                self._buffers[i] = buffer[beam_idx]
                continue
            moved = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero()[:, 0]
            buffer[moved, :, :length] = buffer[beam_idx[moved], :, :length]
        self._show(rows, length)

    def _show(self, rows: int, length: int) -> None:
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._buffers)


def _grown(used: Tensor, like: Tensor, length: int) -> Tensor:
    """`used` [B, heads, T, D] copied to the front of a buffer with room beyond `length` columns."""
    columns = length + max(GROWTH, length // 4)
    buffer = like.new_empty(len(like), like.shape[1], columns, like.shape[3])
    buffer[:, :, : used.shape[2]] = used
    return buffer


class CacheDecoder:
    """`Decoder` (see decoding.py) over `model`, any HF causal LM, PEFT adapters included.

    With `adapters`, names of those of a PeftModel, rows come in as many equal parts, each of which
    is read by its own.
    """

    refills = False

    def __init__(self, model: nn.Module, pad_id: int, adapters: Sequence[str] = ()) -> None:
        self._model = model
        self._adapters = adapters
        self._pad_id = pad_id
        self._device = next(model.parameters()).device
        self._options = _supported_options(model)
        self._cache: DynamicCache | None = None
        self._mask_BT = torch.empty(0)

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        self._cache = preallocated_cache(base_model(self._model).config)
        width = max(map(len, prompts))
        ids = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self._mask_BT = torch.tensor(mask, device=self._device)
        logits = self._forward(torch.tensor(ids, device=self._device))[:, -1]
        repeats = torch.tensor(copies, device=self._device)
        index = torch.arange(len(prompts), device=self._device).repeat_interleave(repeats)
        if len(index) != len(prompts):
            self._reorder(index)
        return logits[index]

    def step(self, tokens: Sequence[int]) -> Tensor:
        new = self._mask_BT.new_ones(len(tokens), 1)
        self._mask_BT = torch.cat([self._mask_BT, new], dim=1)
        return self._forward(torch.tensor(tokens, device=self._device)[:, None])[:, -1]

    @property
    def rewinds(self) -> bool:
        """A window or a recurrent state cannot leave a token out."""
        layers = preallocated_cache(base_model(self._model).config).layers
        return bool(layers) and all(isinstance(layer, PreallocatedLayer) for layer in layers)

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        new = self._mask_BT.new_ones(len(tokens), len(tokens[0]))
        self._mask_BT = torch.cat([self._mask_BT, new], dim=1)
        return self._forward(torch.tensor(tokens, device=self._device), len(tokens[0]))

    def rewind(self, counts: Sequence[int]) -> None:
        assert self._cache is not None
        width = self._mask_BT.shape[1]
        for mask_T, back in zip(self._mask_BT, counts, strict=True):
            mask_T[width - back :] = 0
        end = width - min(counts)  # what no row keeps
        self._mask_BT = self._mask_BT[:, :end]
        self._cache.crop(end)

    def keep(self, index: Sequence[int]) -> None:
        if index:
            self._reorder(torch.tensor(index, device=self._device))
        else:
            self._cache = None

    def _reorder(self, index: Tensor) -> None:
        assert self._cache is not None
        self._cache.reorder_cache(index)  # type: ignore[arg-type]
        self._mask_BT = self._mask_BT[index]

    def _forward(self, ids_BT: Tensor, count: int = 1) -> Tensor:
        """Logits after each of the last `count` tokens, [B, count, V]."""
        options: dict[str, Any] = {}
        if "position_ids" in self._options:
            position_BT = (self._mask_BT.cumsum(1) - 1).clamp_(min=0)
            options["position_ids"] = position_BT[:, -ids_BT.shape[1] :]
        if "logits_to_keep" in self._options:
            options["logits_to_keep"] = count
        if self._adapters:
            share = len(ids_BT) // len(self._adapters)
            options["adapter_names"] = [name for name in self._adapters for _ in range(share)]
        output = self._model(
            input_ids=ids_BT,
            attention_mask=self._mask_BT,
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        return output.logits[:, -count:]


def preallocated_cache(config: Any) -> DynamicCache:
    """The cache that transformers would use for `config`, its full-attention layers written in
    place."""
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def base_model(model: nn.Module) -> Any:
    """The transformers model inside `model`, which may be wrapped by PEFT."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner else model


def _supported_options(model: nn.Module) -> set[str]:
    return set(inspect.signature(base_model(model).forward).parameters)
