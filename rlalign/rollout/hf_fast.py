"""Decoding with the plain decoder of Llama, Qwen2, Qwen3 and Mistral, at a fraction of the cost.

    q, k, v = projections of norm(x);  x <- x + o_proj(attention(rope(q), rope(k), v))
    x <- x + down_proj(act(gate) * up),  gate, up = projections of norm(x)
    logits = lm_head(norm(x))

A decoding step of a small model costs as much in calls as in arithmetic, so what can be done in one
call is: neighbouring projections, the rotation of q and k, the cache write of k and v. Every row of
the cache keeps its own length, so rows enter and leave at any time. A decoder lives for one call of
`generate` and reads the model's own parameters; only small projections are copied, to be joined or
turned, and layers that are not plain `nn.Linear` (LoRA) are called as they are. Nothing can go
stale.

Shapes: B rows, T columns of the cache in use, D hidden size, H query heads, K key-value heads,
G = H / K queries per key-value head, d head size, P prompts, V vocabulary; [...] is [B] when
decoding and [P, T] when reading prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from rlalign.rollout.decoding import tensor_of
from rlalign.rollout.hf_cache import base_model

PLAIN_DECODERS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others change with the longest row
JOIN_BYTES = 2**21  # projections below this size are copied: calls and cache misses outweigh that
GROWTH = 64  # columns added at least when the cache is full

Layer = Callable[[Tensor], Tensor]


def is_plain_decoder(model: nn.Module, longest: int) -> bool:
    """Whether `FastDecoder` computes what `model` does, for sequences up to `longest` tokens."""
    config = base_model(model).config
    window = getattr(config, "sliding_window", None)
    adapters = getattr(model, "peft_config", {})
    return (
        type(base_model(model)) in PLAIN_DECODERS
        and config.rope_parameters["rope_type"] in FIXED_ROPE
        and getattr(config, "is_causal", True)
        and (window is None or window >= longest)
        and not any(adapter.is_prompt_learning for adapter in adapters.values())
    )


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer, taken apart."""

    norm: Layer
    qkv: Layer  # to [..., H + K + K, d]
    qk_norm: Layer | None
    out: Layer
    mlp_norm: Layer
    gate_up: Layer
    act: Layer
    down: Layer


def take_apart(layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    project = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
    return Block(
        norm=_rms_norm(layer.input_layernorm),
        qkv=lambda x: project(x).view(*x.shape[:-1], -1, attention.head_dim),
        qk_norm=_qk_norm(attention) if hasattr(attention, "q_norm") else None,
        out=_joined([attention.o_proj]),
        mlp_norm=_rms_norm(layer.post_attention_layernorm),
        gate_up=_joined([mlp.gate_proj, mlp.up_proj]),
        act=mlp.act_fn,
        down=_joined([mlp.down_proj]),
    )


class FastDecoder:
    """`Decoder` (see decoding.py) over a model for which `is_plain_decoder` holds.

    `longest` bounds the length of any row.
    """

    refills = True
    rewinds = True

    def __init__(self, model: nn.Module, longest: int) -> None:
        base = base_model(model)
        body = base.model
        self._embedding = body.embed_tokens.weight
        self._device = self._embedding.device
        self._blocks = [take_apart(layer) for layer in body.layers]
        self._norm, self._head = _rms_norm(body.norm), _called(base.lm_head)
        self._kv_heads: int = base.config.num_key_value_heads
        self._longest = longest
        self._lengths: list[int] = []  # of the rows in use
        self._caches: list[Tensor] = []  # a layer's keys and values: [2, rows, K, columns, d]
        cos, sin = body.rotary_emb(
            self._embedding, torch.arange(longest, device=self._device)[None]
        )
        half = sin.shape[-1] // 2
        self._cos_T1d = cos[0][:, None]
        self._sin_T1d = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)[:, None]

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        width = max(map(len, prompts))
        ids = [list(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
        repeats = torch.tensor(copies, device=self._device)
        prompt_of_row = torch.arange(len(prompts), device=self._device).repeat_interleave(repeats)
        first = len(self._lengths)
        self._lengths += [len(p) for p, n in zip(prompts, copies, strict=True) for _ in range(n)]
        self._reserve(len(self._lengths), width + 1)

        def attend(i: int, query: Tensor, kv: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in (query, *self._split(kv)))
            for side, x in enumerate((key, value)):
                self._caches[i][side, first : len(self._lengths), :, :width] = x[prompt_of_row]
            # A row that was here before may have left NaN, which no weight of zero hides.
            self._caches[i][:, first : len(self._lengths), :, width:] = 0
            # Padding is on the right, where causality hides it.
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            ).transpose(1, 2)

        cos, sin = self._cos_T1d[:width], self._sin_T1d[:width]
        x_PTD = self._run(torch.tensor(ids, device=self._device), cos, sin, attend)
        last_P = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        x_PD = x_PTD[torch.arange(len(prompts), device=self._device), last_P]
        return self._head(self._norm(x_PD))[prompt_of_row]

    def step(self, tokens: Sequence[int]) -> Tensor:
        position_B = tensor_of(self._lengths, self._device)
        row_B = torch.arange(len(tokens), device=self._device)
        self._lengths = [length + 1 for length in self._lengths]
        width = max(self._lengths)
        self._reserve(len(tokens), width)
        mask_BT = self._mask(position_B, width)

        def attend(i: int, query: Tensor, kv: Tensor) -> Tensor:
            cache = self._caches[i]
            cache[:, row_B, :, position_B] = kv.unflatten(1, (2, -1))
            key, value = cache[:, : len(tokens), :, :width]
            return _attend_last(query, key, value, mask_BT)

        cos, sin = self._cos_T1d[position_B], self._sin_T1d[position_B]
        x_BD = self._run(tensor_of(tokens, self._device), cos, sin, attend)
        return self._head(self._norm(x_BD))

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        count = len(tokens[0])
        start_B = torch.tensor(self._lengths, device=self._device)
        position_BN = start_B[:, None] + torch.arange(count, device=self._device)
        row_B1 = torch.arange(len(tokens), device=self._device)[:, None]
        self._lengths = [length + count for length in self._lengths]
        width = max(self._lengths)
        self._reserve(len(tokens), width)
        mask_BNT = self._mask(position_BN, width)

        def attend(i: int, query: Tensor, kv: Tensor) -> Tensor:
            cache = self._caches[i]
            cache[:, row_B1, :, position_BN] = kv.unflatten(2, (2, -1))
            key, value = cache[:, : len(tokens), :, :width]
            grouped = query.shape[2] != key.shape[1]
            return F.scaled_dot_product_attention(
                query.transpose(1, 2), key, value, attn_mask=mask_BNT[:, None], enable_gqa=grouped
            ).transpose(1, 2)

        cos, sin = self._cos_T1d[position_BN], self._sin_T1d[position_BN]
        x_BND = self._run(torch.tensor(tokens, device=self._device), cos, sin, attend)
        return self._head(self._norm(x_BND))

    def rewind(self, counts: Sequence[int]) -> None:
        self._lengths = [n - back for n, back in zip(self._lengths, counts, strict=True)]

    def keep(self, index: Sequence[int]) -> None:
        moves = [(i, source) for i, source in enumerate(index) if i != source]
        if moves:
            width = max(self._lengths)
            target, source = torch.tensor(moves, device=self._device).T
            for cache in self._caches:
                cache[:, target, :, :width] = cache[:, source, :, :width]
        self._lengths = [self._lengths[source] for source in index]

    def _run(
        self,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Token ids [...] to the last layer's output [..., D]. `attend(layer, query [..., H, d],
        keys and values [..., 2K, d])` gives [..., H, d]."""
        x = F.embedding(ids, self._embedding)
        for i, block in enumerate(self._blocks):
            qkv = block.qkv(block.norm(x))
            queries = qkv.shape[-2] - 2 * self._kv_heads
            qk = qkv[..., : -self._kv_heads, :]
            if block.qk_norm is not None:
                qk.copy_(block.qk_norm(qk))
            _rotate_(qk, cos, sin)
            out = attend(i, qkv[..., :queries, :], qkv[..., queries:, :])
            x = x + block.out(out.flatten(-2))
            gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, -1)
            x += block.down(block.act(gate).mul_(up))
        return x

    def _split(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        return kv[..., : self._kv_heads, :], kv[..., self._kv_heads :, :]

    def _mask(self, position: Tensor, width: int) -> Tensor:
        """[..., T], added to scores: a token sees the columns up to its position."""
        hidden = torch.arange(width, device=self._device) > position[..., None]
        mask = torch.zeros_like(hidden, dtype=self._embedding.dtype)
        return mask.masked_fill_(hidden, -torch.inf)

    def _reserve(self, rows: int, width: int) -> None:
        """Make room for `rows` of `width` columns, keeping what is there."""
        if not self._caches:
            size = self._cos_T1d.shape[-1]
            empty = self._embedding.new_empty(2, 0, self._kv_heads, 0, size)
            self._caches = [empty] * len(self._blocks)
        had_rows, had_columns = self._caches[0].shape[1], self._caches[0].shape[3]
        if rows <= had_rows and width <= had_columns:
            return
        columns = had_columns
        if width > had_columns:
            columns = min(self._longest, width + max(GROWTH, width // 4))
        for i, cache in enumerate(self._caches):
            # Zeros, since columns that a row has not reached meet a weight of zero: 0 * NaN is NaN.
            larger = cache.new_zeros(
                2, max(rows, had_rows), *cache.shape[2:3], columns, cache.shape[4]
            )
            larger[:, :had_rows, :, :had_columns] = cache
            self._caches[i] = larger


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of [..., heads, d], in place: x cos + (-x2, x1) sin for its halves x1 and x2
    (Su et al., https://arxiv.org/abs/2104.09864, section 3.4.2); `sin` has the minus already."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)


def _attend_last(
    query_BHd: Tensor, key_BKTd: Tensor, value_BKTd: Tensor, mask_BT: Tensor
) -> Tensor:
    """Attention of one query per row: [B, H, d]."""
    rows, kv_heads, _, size = key_BKTd.shape
    query_BKGd = query_BHd.unflatten(1, (kv_heads, -1))
    if query_BHd.is_cuda or query_BHd.dtype != torch.float32:
        mask = mask_BT[:, None, None]
        out = F.scaled_dot_product_attention(query_BKGd, key_BKTd, value_BKTd, attn_mask=mask)
        return out.flatten(1, 2)
    # For one query per row two batched products are quicker on a CPU than its attention kernel.
    mask_N1T = mask_BT.repeat_interleave(kv_heads, 0)[:, None]
    key_NTd, value_NTd = (_one_batch(x) for x in (key_BKTd, value_BKTd))
    score_NGT = torch.baddbmm(
        mask_N1T, query_BKGd.flatten(0, 1), key_NTd.transpose(1, 2), alpha=size**-0.5
    )
    return torch.bmm(score_NGT.softmax(-1), value_NTd).view(rows, -1, size)


def _one_batch(x_BKTd: Tensor) -> Tensor:
    """[B, K, T, d], the first rows and columns of a wider buffer, as a view [N = B * K, T, d]."""
    rows, heads, width, size = x_BKTd.shape
    return x_BKTd.as_strided((rows * heads, width, size), x_BKTd.stride()[1:])


def _called(module: nn.Module) -> Layer:
    """`module` itself, or its function where it is a plain linear layer: half the overhead."""
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module


def _joined(modules: Sequence[Any]) -> Layer:
    """The outputs of linear layers side by side: [..., sum of their widths]."""
    biases = [m.bias for m in modules if getattr(m, "bias", None) is not None]
    if (
        any(type(module) is not nn.Linear for module in modules)
        or len(biases) not in (0, len(modules))
        or sum(module.weight.nbytes for module in modules) > JOIN_BYTES
    ):
        calls = [_called(module) for module in modules]
        return lambda x: torch.cat([call(x) for call in calls], -1)
    # Transposed: a product reads it faster when it is not in the processor's cache.
    weight = torch.cat([module.weight for module in modules]).t().contiguous().t()
    return partial(F.linear, weight=weight, bias=torch.cat(biases) if biases else None)


def _rms_norm(module: Any) -> Layer:
    return partial(_normalised, weight=module.weight, eps=module.variance_epsilon)


def _qk_norm(attention: Any) -> Layer:
    """The norms of the query heads and the key heads at once, on [..., H + K, d]."""
    size = attention.head_dim
    heads = (module.out_features // size for module in (attention.q_proj, attention.k_proj))
    norms = (attention.q_norm, attention.k_norm)
    rows = [norm.weight.expand(n, size) for norm, n in zip(norms, heads, strict=True)]
    return partial(_normalised, weight=torch.cat(rows), eps=attention.q_norm.variance_epsilon)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich, https://arxiv.org/abs/1910.07467)."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
    # The weight comes after the rounding to the model's dtype, as in transformers.
    return (wide * scale).to(x.dtype).mul_(weight)
