"""Hidden states of any HF causal LM over sequences laid end to end: no padding token meets a linear
layer, and attention never crosses a sequence's border.

The model runs on one row of N tokens, each with its position within its own sequence. Its attention
modules call the implementation registered here under ATTENTION, which receives the `Pack` as a
keyword argument and attends within each sequence: by torch's variable-length kernel on a GPU in
half precision, else by buckets of similar lengths, right-padded just for the attention itself.
Under causality a real token never sees the padding behind it, so the result is exact. Without a
`Pack` the same implementation is the ordinary padded attention, so one model serves both.

Shapes: S sequences, N tokens of all of them, D hidden size, H query heads, K key-value heads,
d head size, b sequences of a bucket, t tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "rlalign_packed"
BUCKET_RATIO = 0.8  # a sequence shorter than this share of its bucket's longest opens a new one
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

_packing: ContextVar[bool] = ContextVar("rlalign_packing", default=False)


class PackingError(RuntimeError):
    """The model cannot run on packed sequences; the message names it and the fix."""


@dataclass(frozen=True, eq=False, slots=True)
class Bucket:
    """`count` consecutive sequences of a pack, at most `width` tokens each, `tokens` in all.
    `cell_n` is where each token lies in the padded [b * t] grid; None: no padding, a view does."""

    count: int
    width: int
    tokens: int
    cell_n: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Pack:
    """S sequences laid end to end, longest first.

    `start[i]` is the place in the pack of the first token of the i-th sequence as given.

    >>> pack = make_pack([(5, 6), (7, 8, 9)])
    >>> pack.input_ids_N.tolist(), pack.position_ids_N.tolist(), pack.start
    ([7, 8, 9, 5, 6], [0, 1, 2, 0, 1], (3, 0))
    """

    input_ids_N: Tensor
    position_ids_N: Tensor
    start: tuple[int, ...]
    lengths: tuple[int, ...]  # in the pack's order
    boundaries: Tensor  # [S + 1] int32, cumulative lengths
    buckets: tuple[Bucket, ...]


@dataclass(slots=True)
class _Run:
    """One forward pass: the pack, and how many attention layers have honoured it."""

    pack: Pack
    calls: int = 0


def make_pack(sequences: Sequence[Sequence[int]], device: torch.device | str | None = None) -> Pack:
    """Lay token id sequences end to end. Raises ValueError where there is none or an empty one."""
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise ValueError("a pack needs at least one sequence, and a token in each")
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    lengths = tuple(len(sequences[i]) for i in order)
    start, total = [0] * len(order), 0
    for i, length in zip(order, lengths, strict=True):
        start[i], total = total, total + length
    length_S = torch.tensor(lengths)
    boundaries = F.pad(length_S.cumsum(0), (1, 0))
    position_ids_N = torch.arange(total) - boundaries[:-1].repeat_interleave(length_S)
    input_ids_N = torch.tensor([token for i in order for token in sequences[i]])
    return Pack(
        input_ids_N=input_ids_N.to(device),
        position_ids_N=position_ids_N.to(device),
        start=tuple(start),
        lengths=lengths,
        boundaries=boundaries.to(device, torch.int32),
        buckets=tuple(_bucket(part, device) for part in _split_lengths(lengths)),
    )


def replaceable(model: PreTrainedModel) -> bool:
    """Whether the model's attention is called through transformers' attention interface."""
    return type(model)._can_set_attn_implementation()


def install(model: PreTrainedModel) -> None:
    """Switch `model` to the attention of this module. Raises PackingError where it cannot."""
    _refuse_unless(
        replaceable(model),
        model,
        "its attention is not replaceable (it predates transformers' attention interface)",
    )
    model.set_attn_implementation(ATTENTION)


def packed_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """Final hidden states [N, D] of the pack's tokens; `model` went through `install`.

    Raises PackingError where a layer mixes tokens other than by an attention that honours the pack.
    """
    run = _Run(pack)
    token = _packing.set(True)
    try:
        hidden = model.base_model(
            input_ids=pack.input_ids_N[None],
            position_ids=pack.position_ids_N[None],
            use_cache=False,
            packed_run=run,
        ).last_hidden_state
    finally:
        _packing.reset(token)
    layers = model.config.get_text_config().num_hidden_layers
    _refuse_unless(
        run.calls == layers,
        model,
        f"{run.calls} of its {layers} layers attend within sequence borders",
    )
    return hidden[0]


def padded_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """The same by the model's ordinary forward over a right-padded batch and its mask."""
    length_S = torch.tensor(pack.lengths)
    width = pack.lengths[0]
    real_ST = torch.arange(width) < length_S[:, None]
    cell_N = real_ST.flatten().nonzero()[:, 0].to(pack.input_ids_N.device)
    ids = pack.input_ids_N.new_zeros(real_ST.numel()).index_copy(0, cell_N, pack.input_ids_N)
    hidden = model.base_model(
        input_ids=ids.view(real_ST.shape),
        attention_mask=real_ST.to(ids.device),
        use_cache=False,
    ).last_hidden_state
    return collect(hidden.flatten(0, 1), cell_N)


def collect(rows: Tensor, index_n: Tensor) -> Tensor:
    """Rows `index_n` (no index twice) of `rows`: index_select with a quick gradient."""
    return _Collect.apply(rows, index_n)


def _refuse_unless(fine: bool, model: nn.Module, reason: str) -> None:
    if not fine:
        raise PackingError(
            f"{type(model).__name__} cannot run on packed sequences: {reason}; "
            "set trainer.packing=false"
        )


def _split_lengths(lengths: Sequence[int]) -> list[list[int]]:
    parts: list[list[int]] = []
    for length in lengths:  # longest first
        if parts and length >= BUCKET_RATIO * parts[-1][0]:
            parts[-1].append(length)
        else:
            parts.append([length])
    return parts


def _bucket(lengths: list[int], device: torch.device | str | None) -> Bucket:
    count, width, tokens = len(lengths), lengths[0], sum(lengths)
    if tokens == count * width:
        return Bucket(count, width, tokens, None)
    real_bt = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Bucket(count, width, tokens, real_bt.flatten().nonzero()[:, 0].to(device))


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
    packed_run: _Run | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: query [., H, ., d] -> [., ., H, d]."""
    if packed_run is None:
        if _packing.get():
            _refuse_unless(False, module, "its layers do not hand keyword arguments to attention")
        out = _padded(
            module, query, key, value, attention_mask, dropout, scaling, softcap, is_causal, kwargs
        )
        return out, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unknown = [k for k, v in kwargs.items() if v is not None and k not in HARMLESS]
    _refuse_unless(causal, module, "it attends to later tokens")
    _refuse_unless(not dropout, module, "it drops attention weights at random")
    _refuse_unless(not unknown, module, f"its attention takes {', '.join(unknown)}")
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
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and softcap is None and query.shape[-1] <= 256


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

    longest = pack.lengths[0]
    left = -1 if window is None else window - 1
    out = varlen_attn(
        query_NHd.contiguous(),
        key_NKd.contiguous(),
        value_NKd.contiguous(),
        pack.boundaries,
        pack.boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=query_NHd.shape[1] != key_NKd.shape[1],
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
    parts = [x.split(sizes) for x in (query_NHd, key_NKd, value_NKd)]
    outputs = []
    for bucket, *rows in zip(pack.buckets, *parts, strict=True):
        grids = [_to_grid(x, bucket).transpose(1, 2) for x in rows]  # [b, heads, t, d]
        out_bHtd = _attend(*grids, scaling=scaling, window=window, softcap=softcap)
        outputs.append(_from_grid(out_bHtd.transpose(1, 2), bucket))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _to_grid(rows: Tensor, bucket: Bucket) -> Tensor:
    """[n, heads, d] -> [b, t, heads, d], zeros behind each sequence."""
    cells = bucket.count * bucket.width
    grid = rows if bucket.cell_n is None else _Spread.apply(rows, bucket.cell_n, cells)
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


class _Spread(torch.autograd.Function):
    """Rows [n, ...] put at `cell_n` of zeros [cells, ...]; each cell is hit at most once, so the
    gradient is a plain gather (index_select's own backward adds row by row)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cell_n: Tensor, cells: int) -> Tensor:
        ctx.save_for_backward(cell_n)
        return rows.new_zeros(cells, *rows.shape[1:]).index_copy_(0, cell_n, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (cell_n,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, cell_n), None, None


class _Collect(torch.autograd.Function):
    """Rows `cell_n` of a grid [cells, ...]: the inverse of _Spread."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, cell_n: Tensor) -> Tensor:
        ctx.save_for_backward(cell_n)
        ctx.cells = len(grid)
        return grid.index_select(0, cell_n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (cell_n,) = ctx.saved_tensors
        grad = grad_outputs[0]
        return grad.new_zeros(ctx.cells, *grad.shape[1:]).index_copy_(0, cell_n, grad), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask while a pack runs (it would be N x N); otherwise sdpa's."""
    return None if _packing.get() else sdpa_mask(*args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
