"""The plain-torch backend of `linear_logprob`: tiles of logits, on any device and in float64 too.

The forward pass reduces a tile of logits to a few numbers a row. The backward pass computes it
again and turns that buffer into the gradient, with p = e^(z - lse) and Ez = sum p z:

    dL/dz_v = g 1[v = y] + p_v (l - g - e (z_v - Ez))

Columns are the outer loop: a slice of the head is read (and converted to fp32) once, and its
gradient is finished before the next one begins. Tiles are about square, so that no matrix product
has a short side and a CPU finds the tile in its cache.

Shapes: M rows, D hidden size, V vocabulary, C rows of one tile, S columns of one tile, R rank of
the head's adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlalign.kernels.partials import Partials, merge
from rlalign.kernels.transform import Grads, Head, Rows, Transform, Upstream, accumulator

TILE_SIDE = {"cpu": 1024, "cuda": 4096}  # 4 MiB of fp32 logits, 64 on a GPU
SLICE_BYTES = 32 * 2**20  # fp32 copy of the part of a half-precision head in use
LOWEST = -1e30  # stands for -inf where a zero probability multiplies it: 0 * -inf is NaN


class Slice(NamedTuple):
    """Some columns of the logits: rows of the head, in the accumulator's dtype."""

    cols: slice
    weight: Tensor  # [S, D]
    bias: Tensor | None  # [S]
    lora_weight: Tensor | None  # [S, R]


def statistics(
    rows: Rows, head: Head, transform: Transform, entropy: bool, *, chunk_size: int = 0, **_: Any
) -> Partials:
    """Partials [M] over the head's columns, in the accumulator's dtype."""
    dtype = accumulator(rows.hidden.dtype)
    whole = Partials(*rows.hidden.new_zeros(4, len(rows.target), dtype=dtype))
    whole.max.fill_(-math.inf)
    tile = tile_shape(rows, head, chunk_size)
    buffer = rows.hidden.new_empty(tile[0] * tile[1], dtype=dtype)
    for part in slices(head, tile[1], dtype):
        for at in chunks(rows, tile[0]):
            z_CS = logits(rows, part, transform, at, buffer)
            so_far = Partials(*(x[at] for x in whole))
            new = _tile_statistics(z_CS, rows.target[at] - part.cols.start, entropy)
            pairs = zip(so_far, new, strict=True)
            for x, value in zip(so_far, merge(Partials(*map(torch.stack, pairs))), strict=True):
                x.copy_(value)
    return whole


def gradients(
    rows: Rows,
    head: Head,
    transform: Transform,
    lse_M: Tensor,
    mean_M: Tensor,
    upstream: Upstream,
    needs: Grads[bool],
    *,
    chunk_size: int = 0,
    **_: Any,
) -> Grads[Tensor | None]:
    """The gradients that `needs` asks for, summed in fp32: sums in bf16 would lose two digits.
    Those of the head come in its dtype, the others in the accumulator's."""
    dtype = accumulator(rows.hidden.dtype)
    out = _zeros(rows, head, needs, dtype)
    tile = tile_shape(rows, head, chunk_size)
    buffer = rows.hidden.new_empty(tile[0] * tile[1], dtype=dtype)
    for part in slices(head, tile[1], dtype):
        sums = _sums(out, part, dtype)
        for at in chunks(rows, tile[0]):
            z_CS = logits(rows, part, transform, at, buffer)
            local_C = rows.target[at] - part.cols.start
            given = Upstream(*(x if x is None else x[at] for x in upstream))  # pyright: ignore
            grad_CS = tile_gradient(z_CS, local_C, transform, lse_M[at], mean_M[at], given)
            _add(sums, rows, part, at, grad_CS)
        for x, total in zip(out, sums, strict=True):
            if x is not None and total is not None and x.dtype != total.dtype:
                x[part.cols] = total.to(x.dtype)
    return out


def _tile_statistics(z_CS: Tensor, local_C: Tensor, entropy: bool) -> Partials:
    """Of one tile, whose buffer is used up."""
    safe_C, inside_C = within(local_C, z_CS)
    chosen_C = torch.where(inside_C, z_CS.gather(1, safe_C[:, None])[:, 0], 0)
    max_C = z_CS.amax(1)
    shifted_CS = z_CS.sub_(max_C.masked_fill(max_C == -math.inf, 0)[:, None])
    if not entropy:
        return Partials(max_C, shifted_CS.exp_().sum(1), torch.zeros_like(max_C), chosen_C)
    exp_CS = shifted_CS.exp()
    moment_C = shifted_CS.clamp_min_(LOWEST).mul_(exp_CS).sum(1)
    return Partials(max_C, exp_CS.sum(1), moment_C, chosen_C)


def tile_gradient(
    z_CS: Tensor,
    local_C: Tensor,
    transform: Transform,
    lse_C: Tensor,
    mean_C: Tensor,
    upstream: Upstream,
) -> Tensor:
    """dL/d(h . w + b) of one tile, in the logits' buffer."""
    slope_CS = None if transform.softcap is None else softcap_slope(z_CS, transform)
    scale = transform.slope if slope_CS is None else 1.0
    g_C = upstream.logp * scale
    factor_C = -g_C if upstream.lse is None else upstream.lse * scale - g_C
    if upstream.entropy is None:
        z_CS.sub_(lse_C[:, None]).exp_().mul_(factor_C[:, None])
    else:
        p_CS = (z_CS - lse_C[:, None]).exp_()
        z_CS.clamp_min_(LOWEST).sub_(mean_C[:, None]).mul_(-(upstream.entropy * scale)[:, None])
        z_CS.add_(factor_C[:, None]).mul_(p_CS)
    safe_C, inside_C = within(local_C, z_CS)
    z_CS.scatter_add_(1, safe_C[:, None], torch.where(inside_C, g_C, 0)[:, None])
    return z_CS if slope_CS is None else z_CS.mul_(slope_CS)


def _add(sums: Grads[Tensor | None], rows: Rows, part: Slice, at: slice, grad_CS: Tensor) -> None:
    """Take one tile into the sums: all rows' of what is per row, this slice's of the head's."""
    if sums.hidden is not None:
        sums.hidden[at].addmm_(grad_CS, part.weight)
    if sums.weight is not None:
        sums.weight.addmm_(grad_CS.T, rows.hidden[at].to(grad_CS.dtype))
    if sums.bias is not None:
        sums.bias.add_(grad_CS.sum(0))
    if sums.lora_hidden is not None and part.lora_weight is not None:
        sums.lora_hidden[at].addmm_(grad_CS, part.lora_weight)
    if sums.lora_weight is not None and rows.lora_hidden is not None:
        sums.lora_weight.addmm_(grad_CS.T, rows.lora_hidden[at].to(grad_CS.dtype))


def _zeros(rows: Rows, head: Head, needs: Grads[bool], dtype: torch.dtype) -> Grads[Tensor | None]:
    def zeros(x: Tensor | None, need: bool, dtype: torch.dtype | None = None) -> Tensor | None:
        return torch.zeros_like(x, dtype=dtype) if x is not None and need else None

    return Grads(
        hidden=zeros(rows.hidden, needs.hidden, dtype),
        weight=zeros(head.weight, needs.weight),
        bias=zeros(head.bias, needs.bias),
        lora_hidden=zeros(rows.lora_hidden, needs.lora_hidden, dtype),
        lora_weight=zeros(head.lora_weight, needs.lora_weight),
    )


def _sums(out: Grads[Tensor | None], part: Slice, dtype: torch.dtype) -> Grads[Tensor | None]:
    """Where a slice is summed up: in its part of the result if that is of `dtype`, else beside."""

    def place(x: Tensor | None) -> Tensor | None:
        if x is None or x.dtype == dtype:
            return x if x is None else x[part.cols]
        return torch.zeros_like(x[part.cols], dtype=dtype)

    return out._replace(
        weight=place(out.weight), bias=place(out.bias), lora_weight=place(out.lora_weight)
    )


def slices(head: Head, size: int, dtype: torch.dtype) -> Iterator[Slice]:
    for start in range(0, head.cols, size):
        cols = slice(start, min(start + size, head.cols))
        weight, bias, lora_weight = (
            x if x is None else x[cols].to(dtype)
            for x in (head.weight, head.bias, head.lora_weight)
        )
        assert weight is not None
        yield Slice(cols, weight, bias, lora_weight)


def chunks(rows: Rows, size: int) -> Iterator[slice]:
    for start in range(0, len(rows.target), size):
        yield slice(start, min(start + size, len(rows.target)))


def tile_shape(rows: Rows, head: Head, chunk_size: int) -> tuple[int, int]:
    """Rows and columns of a tile: a square, or as long as it must be where the other side is
    short."""
    side = TILE_SIDE.get(rows.hidden.device.type, TILE_SIDE["cuda"])
    count = chunk_size or max(side, side**2 // max(head.cols, 1))
    count = max(1, min(count, len(rows.target)))
    cols = max(side, side**2 // count)
    if head.weight.dtype != accumulator(rows.hidden.dtype):
        cols = min(cols, max(side, SLICE_BYTES // (4 * head.weight.shape[1])))
    return count, max(1, min(cols, head.cols))


def logits(rows: Rows, part: Slice, transform: Transform, at: slice, buffer: Tensor) -> Tensor:
    """z [C, S] in `buffer`, in the accumulator's dtype: never rounded to half precision. The factor
    meets the finished sums: on the hidden states it would cost them a rounding."""
    dtype, factor = buffer.dtype, transform.factor
    shape = (at.stop - at.start, len(part.weight))
    z_CS = buffer[: shape[0] * shape[1]].view(shape)
    torch.addmm(z_CS, rows.hidden[at].to(dtype), part.weight.T, beta=0, alpha=factor, out=z_CS)
    if rows.lora_hidden is not None and part.lora_weight is not None:
        z_CS.addmm_(rows.lora_hidden[at].to(dtype), part.lora_weight.T, alpha=factor)
    if part.bias is not None:
        z_CS.add_(part.bias, alpha=factor)
    return capped(z_CS, transform)


def capped(z: Tensor, transform: Transform) -> Tensor:
    """z in place of factor * (h . w + b), of any shape."""
    if transform.softcap is None:
        return z
    return z.div_(transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)


def within(local_C: Tensor, z_CS: Tensor) -> tuple[Tensor, Tensor]:
    """The targets as columns of a tile with 0 where they lie outside of it, and where they do
    not."""
    inside_C = (local_C >= 0) & (local_C < z_CS.shape[1])
    return torch.where(inside_C, local_C, 0), inside_C


def softcap_slope(z_CS: Tensor, transform: Transform) -> Tensor:
    """dz / d(h . w + b) at each logit: slope * (1 - (z T / cap)^2)."""
    assert transform.softcap is not None
    ratio_CS = z_CS * (transform.temperature / transform.softcap)
    return ratio_CS.square_().neg_().add_(1).mul_(transform.slope)
