"""The attention of packed models, under transformers' attention interface as ATTENTION.

Called with a `PackedRun` (which `packed_hidden` hands through the layers as the keyword argument
`packed_run`) it attends within each sequence of the pack and to its context: by torch's
variable-length kernel on a GPU in half precision, else by buckets of similar lengths, right-padded
for the attention itself. Under causality a real token never sees the padding behind it, so the
result is exact. Without one it is ordinary padded attention, so one model serves training and
sampling.

A softcap of the scores (Gemma 2) is honoured in both; transformers' own sdpa leaves it out.

Shapes: N tokens, M keys (each sequence's context and own tokens), H query heads, K key-value heads,
d head size, b sequences of a bucket, t tokens of its longest, n own tokens of a bucket, m of its
own and context tokens.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlalign.models.pack import Bucket, Pack, collect, refuse_unless, spread

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
    """One forward pass: the pack, and how many attention layers have honoured it."""

    pack: Pack
    calls: int = 0


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
    out_NHd = run(query, key, value, packed_run.pack, scaling, sliding_window, softcap)
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
        mask = _causal_mask(query.shape[2], None, query.device)
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
    pack: Pack,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    key_MKd, value_MKd = key_NKd, value_NKd
    if len(pack.context_C):
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
        pack.lengths[0] + pack.contexts[0],
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
    pack: Pack,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention bucket by bucket, each a right-padded batch."""
    sizes = [bucket.tokens for bucket in pack.buckets]
    parts = zip(
        pack.buckets,
        query_NHd.split(sizes),
        _with_context(key_NKd, pack, sizes),
        _with_context(value_NKd, pack, sizes),
        strict=True,
    )
    outputs = []
    for bucket, query_nHd, key_mKd, value_mKd in parts:
        # Cells of the context hold no query: what comes out there is not collected.
        grids = [
            _to_grid(rows, cells, bucket).transpose(1, 2)  # [b, heads, t, d]
            for rows, cells in (
                (query_nHd, bucket.cell_n),
                (key_mKd, bucket.cell_m),
                (value_mKd, bucket.cell_m),
            )
        ]
        out_bHtd = _attend(*grids, scaling=scaling, window=window, softcap=softcap)
        outputs.append(_from_grid(out_bHtd.transpose(1, 2), bucket))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _with_context(rows_N: Tensor, pack: Pack, sizes: list[int]) -> list[Tensor]:
    """Keys or values [N, K, d] by bucket: [m, K, d], own rows first."""
    own = rows_N.split(sizes)
    if not len(pack.context_C):
        return list(own)
    context = collect(rows_N, pack.context_C).split([bucket.context for bucket in pack.buckets])
    return [torch.cat(pair) if len(pair[1]) else pair[0] for pair in zip(own, context, strict=True)]


def _to_grid(rows: Tensor, cells: Tensor | None, bucket: Bucket) -> Tensor:
    """[rows, heads, d] -> [b, t, heads, d], zeros where there is no row."""
    grid = rows if cells is None else spread(rows, cells, bucket.count * bucket.width)
    return grid.unflatten(0, (bucket.count, bucket.width))


def _from_grid(grid: Tensor, bucket: Bucket) -> Tensor:
    cells = grid.flatten(0, 1)
    return cells if bucket.cell_n is None else collect(cells, bucket.cell_n)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention [b, H, t, d] of right-padded rows."""
    length = query.shape[2]
    banded = window is not None and window < length
    if softcap is not None:
        mask = _causal_mask(length, window if banded else None, query.device)
        return _softcapped(query, key, value, mask, scaling, softcap)
    mask = _causal_mask(length, window, query.device) if banded else None
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=not banded, scale=scaling, enable_gqa=grouped
    )


def _causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[t, t] bool: token i sees token j where j <= i and, with a window, i - j < window."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


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
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask while a pack runs (it would be N x N); otherwise sdpa's."""
    return None if packing.get() else sdpa_mask(*args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
