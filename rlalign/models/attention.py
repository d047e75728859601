"""The attention of packed models, under transformers' attention interface as ATTENTION.

Called with a `PackedRun` (which `packed_hidden` hands through the layers as the keyword argument
`packed_run`) each sequence of the pack attends to its path: by torch's variable-length kernel on a
GPU in half precision, else by buckets of similar lengths, right-padded for the attention itself.
A real token never sees the padding behind it, so the result is exact. Without one it is ordinary
padded attention, so one model serves training and sampling.

A softcap of the scores (Gemma 2) is honoured in both; transformers' own sdpa leaves it out.

Shapes: N tokens, M tokens of all paths, Q cells for queries, H query heads, K key-value heads, d
head size, b sequences of a bucket, t tokens of its longest path.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlalign.models.pack import Bucket, Pack, collect, refuse_unless, to_cells

ATTENTION = "rlalign_packed"
# keyword arguments of HF attention calls that say nothing about who attends to whom
HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}

packing: ContextVar[bool] = ContextVar("rlalign_packing", default=False)


@dataclass(slots=True)
class PackedRun:
    """One forward pass: the pack, how many attention layers have honoured it, and their masks."""

    pack: Pack
    calls: int = 0
    masks: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    packed_run: PackedRun | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: query [., H, ., d] -> [., ., H, d]."""
    if packed_run is None:
        if packing.get():
            refuse_unless(False, module, "its layers do not hand keyword arguments to attention")
        out = _padded(
            module, query, key, value, attention_mask, dropout, scaling, softcap, is_causal, kwargs
        )
        return out, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unknown = [k for k, v in kwargs.items() if v is not None and k not in HARMLESS]
    refuse_unless(causal, module, "it attends to later tokens")
    refuse_unless(not dropout, module, "it drops attention weights at random")
    refuse_unless(not unknown, module, f"its attention takes {', '.join(unknown)}")
    packed_run.calls += 1
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, d]
    run = _varlen if _varlen_applies(query, softcap) else _bucketed
    out_NHd = run(query, key, value, packed_run, scaling, sliding_window, softcap)
    return out_NHd[None], None


def _padded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Ordinary attention: transformers' own, except that a softcap is honoured."""
    if softcap is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(
            module, query, key, value, mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )[0]  # fmt: skip
    if mask is None and query.shape[2] > 1:
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return _softcapped(query, key, value, mask, scaling, softcap).transpose(1, 2)


def _varlen_applies(query: Tensor, softcap: float | None) -> bool:
    """Flash attention: Ampere and later, half precision, head sizes that are multiples of 8."""
    size = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if not (query.is_cuda and half and softcap is None and size <= 256 and size % 8 == 0):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(
    query_NHd: Tensor,
    key_NKd: Tensor,
    value_NKd: Tensor,
    run: PackedRun,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    pack, key_MKd, value_MKd = run.pack, key_NKd, value_NKd
    if pack.shares:
        key_MKd, value_MKd = collect(key_NKd, pack.key_M), collect(value_NKd, pack.key_M)
    left = -1 if window is None else window - 1
    grouped: dict[str, Any] = {"enable_gqa": True} if query_NHd.shape[1] != key_NKd.shape[1] else {}
    # With more keys than queries the kernel aligns them at the end: a query sees its context whole.
    out = varlen_attn(
        query_NHd.contiguous(),
        key_MKd.contiguous(),
        value_MKd.contiguous(),
        pack.boundaries,
        pack.key_boundaries,
        max(pack.lengths),
        max(bucket.keys for bucket in pack.buckets),
        scale=scaling,
        window_size=(left, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out


def _bucketed(
    query_NHd: Tensor,
    key_NKd: Tensor,
    value_NKd: Tensor,
    run: PackedRun,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention bucket by bucket, each a right-padded batch."""
    pack = run.pack
    query, key, value = query_NHd, key_NKd, value_NKd
    if not pack.dense:
        query = to_cells(query, pack.query_Q, pack.cell_N)
        key, value = (
            collect(x, pack.key_C) if pack.shares else to_cells(x, pack.key_C, pack.cell_N)
            for x in (key, value)
        )
    keys = [bucket.count * bucket.keys for bucket in pack.buckets]
    queries = [bucket.count * bucket.queries for bucket in pack.buckets]
    parts = zip(pack.buckets, query.split(queries), key.split(keys), value.split(keys), strict=True)
    outputs = []
    for bucket, *rows in parts:
        grids = [x.unflatten(0, (bucket.count, -1)).transpose(1, 2) for x in rows]
        mask = _mask_of(bucket, run, window, None if softcap else query.dtype)
        out_bHtd = _attend(*grids, mask=mask, scaling=scaling, softcap=softcap)
        outputs.append(out_bHtd.transpose(1, 2).flatten(0, 1))
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    # Padding, and where a path has cells for queries its context, give what nobody collects.
    return out if pack.dense else collect(out, pack.cell_N)


def _mask_of(
    bucket: Bucket, run: PackedRun, window: int | None, dtype: torch.dtype | None
) -> Tensor | None:
    """[t, t] or [b, 1, queries, t]: bool, or with a dtype 0 and -inf; made once for all layers.
    None where causality alone decides and the kernel knows it."""
    window = None if window is None or window >= bucket.keys else window
    if bucket.context_b is None and window is None and dtype is not None:
        return None
    name = (bucket, window, dtype)
    if name not in run.masks:
        device = run.pack.key_C.device
        position = torch.arange(bucket.queries, device=device)[:, None]
        if bucket.context_b is not None:
            # Beyond its path a query is at the last key: it must see something.
            position = (bucket.context_b[:, None, None, None] + position).clamp(max=bucket.keys - 1)
        key_t = torch.arange(bucket.keys, device=device)
        seen = key_t <= position
        seen = seen if window is None else seen & (key_t > position - window)
        bias = None if dtype is None else torch.zeros(seen.shape, dtype=dtype, device=device)
        run.masks[name] = seen if bias is None else bias.masked_fill_(~seen, -torch.inf)
    return run.masks[name]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention [b, H, queries, d] under `mask`; None: causal."""
    if softcap is not None:
        return _softcapped(query, key, value, mask, scaling, softcap)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """softmax(cap * tanh(q k / cap)) v; `mask` True or 0 where a token may be seen."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        masked = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        scores = masked if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(query.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(query.dtype) @ value


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask while a pack runs (it would be N x N); otherwise sdpa's."""
    return None if packing.get() else sdpa_mask(*args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
