"""The plain-torch backend of `linear_logprob`: chunks of rows, on any device and in float64 too.

The forward pass reduces the logits of a chunk to a few numbers a row. The backward pass computes
them again and turns that buffer into the gradient, with p = e^(z - lse) and Ez = sum p z:

    dL/dz_v = g 1[v = y] + p_v (l - g - e (z_v - Ez))

Shapes: M rows, D hidden size, V vocabulary, C rows of one chunk, R rank of the head's adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlalign.kernels.partials import Partials
from rlalign.kernels.transform import Grads, Head, Rows, Transform, Upstream, accumulator

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # fp32 logits that exist at once, at most
CACHE_BYTES = 4 * 2**20  # a CPU is quicker on chunks near its caches
CACHE_ROWS = 256  # but the head's gradient is read and written once per chunk
BLOCK_BYTES = 2**20
MIN_ROWS = 16  # fewer rows make the matrix products slow
WEIGHT_SLICE_BYTES = 32 * 2**20  # fp32 copy of the part of a half-precision head in use
LOWEST = -1e30  # stands for -inf where a zero probability multiplies it: 0 * -inf is NaN


def statistics(
    rows: Rows, head: Head, transform: Transform, entropy: bool, *, chunk_size: int = 0, **_: Any
) -> Partials:
    """Partials [M] over the head's columns, in the accumulator's dtype."""
    dtype = accumulator(rows.hidden.dtype)
    parts = Partials(*(rows.hidden.new_zeros(len(rows.target), dtype=dtype) for _ in range(4)))
    if not head.cols:
        return parts._replace(max=parts.max - math.inf)
    for at in _chunks(rows, head, chunk_size):
        for block, z_CV in _blocks(at, _logits(rows, head, transform, at)):
            safe_C, inside_C = _safe(rows.target[block])
            parts.chosen[block] = torch.where(inside_C, z_CV.gather(1, safe_C[:, None])[:, 0], 0)
            max_C = z_CV.amax(1)
            parts.max[block] = max_C
            shifted_CV = z_CV.sub_(max_C.masked_fill(max_C == -math.inf, 0)[:, None])
            if entropy:
                exp_CV = shifted_CV.exp()
                parts.sum[block] = exp_CV.sum(1)
                parts.moment[block] = shifted_CV.clamp_min_(LOWEST).mul_(exp_CV).sum(1)
            else:
                parts.sum[block] = shifted_CV.exp_().sum(1)
    return parts


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
    """The gradients that `needs` asks for, accumulated over chunks in fp32: sums in bf16 would
    lose two digits. Those of weights come in the weights' dtype."""
    dtype = accumulator(rows.hidden.dtype)
    sources = (rows.hidden, head.weight, head.bias, rows.lora_hidden, head.lora_weight)
    out = Grads(
        *(
            torch.zeros_like(x, dtype=dtype) if x is not None and need else None
            for x, need in zip(sources, needs, strict=True)
        )
    )
    if head.cols:
        for at in _chunks(rows, head, chunk_size):
            _add_chunk(
                out, rows, head, at, _grad_chunk(rows, head, transform, lse_M, mean_M, upstream, at)
            )
    return out


def _add_chunk(
    out: Grads[Tensor | None], rows: Rows, head: Head, at: slice, grad_CV: Tensor
) -> None:
    dtype, cols = grad_CV.dtype, head.cols
    if out.hidden is not None:
        _times_weight(grad_CV, head.weight[:cols], out.hidden[at])
    if out.weight is not None:
        out.weight[:cols].addmm_(grad_CV.T, rows.hidden[at].to(dtype))
    if out.bias is not None:
        out.bias[:cols] += grad_CV.sum(0)
    if out.lora_hidden is not None:
        assert head.lora_weight is not None
        _times_weight(grad_CV, head.lora_weight[:cols], out.lora_hidden[at])
    if out.lora_weight is not None:
        assert rows.lora_hidden is not None
        out.lora_weight[:cols].addmm_(grad_CV.T, rows.lora_hidden[at].to(dtype))


def _grad_chunk(
    rows: Rows,
    head: Head,
    transform: Transform,
    lse_M: Tensor,
    mean_M: Tensor,
    upstream: Upstream,
    at: slice,
) -> Tensor:
    """dL/d(h . w + b) [C, V] of one chunk."""
    logits_CV = _logits(rows, head, transform, at)
    scale = transform.slope if transform.softcap is None else 1.0
    for block, z_CV in _blocks(at, logits_CV):
        slope_CV = None if transform.softcap is None else _softcap_slope(z_CV, transform)
        g_C = upstream.logp[block] * scale
        factor_C = -g_C if upstream.lse is None else upstream.lse[block] * scale - g_C
        if upstream.entropy is None:
            z_CV.sub_(lse_M[block][:, None]).exp_().mul_(factor_C[:, None])
        else:
            e_C = upstream.entropy[block] * scale
            p_CV = (z_CV - lse_M[block][:, None]).exp_()
            z_CV.clamp_min_(LOWEST).sub_(mean_M[block][:, None]).mul_(-e_C[:, None])
            z_CV.add_(factor_C[:, None]).mul_(p_CV)
        safe_C, inside_C = _safe(rows.target[block])
        z_CV.scatter_add_(1, safe_C[:, None], torch.where(inside_C, g_C, 0)[:, None])
        if slope_CV is not None:
            z_CV.mul_(slope_CV)
    return logits_CV


def _blocks(at: slice, z_CV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of chunk `at` a few at a time: on a CPU what is done to a logit several times over
    is done while it is in the cache."""
    size = len(z_CV)
    if z_CV.device.type == "cpu":
        size = max(1, BLOCK_BYTES // (z_CV.element_size() * z_CV.shape[1]))
    for start in range(0, len(z_CV), size):
        block_CV = z_CV[start : start + size]
        yield slice(at.start + start, at.start + start + len(block_CV)), block_CV


def _chunks(rows: Rows, head: Head, chunk_size: int) -> Iterator[slice]:
    size = chunk_size or _default_rows(head.cols, rows.hidden.device.type)
    for start in range(0, len(rows.target), size):
        yield slice(start, start + size)


def _default_rows(vocab_size: int, device: str) -> int:
    most = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * vocab_size)
    if device == "cpu":
        most = min(most, max(CACHE_ROWS, CACHE_BYTES // (4 * vocab_size)))
    return max(MIN_ROWS, most)


def _safe(target_C: Tensor) -> tuple[Tensor, Tensor]:
    """`target_C` with 0 where it is -1 (no column of this head), and where it is not."""
    inside_C = target_C >= 0
    return target_C.clamp(min=0), inside_C


def _softcap_slope(z_CV: Tensor, transform: Transform) -> Tensor:
    """dz / d(h . w + b) at each logit: slope * (1 - (z T / cap)^2)."""
    assert transform.softcap is not None
    ratio_CV = z_CV * (transform.temperature / transform.softcap)
    return ratio_CV.square_().neg_().add_(1).mul_(transform.slope)


def _logits(rows: Rows, head: Head, transform: Transform, at: slice) -> Tensor:
    """z [C, V] in the accumulator's dtype, never rounded to half precision."""
    dtype, factor = accumulator(rows.hidden.dtype), transform.factor
    z_CV = rows.hidden.new_empty(len(rows.target[at]), head.cols, dtype=dtype)
    _product(rows.hidden[at].to(dtype), head.weight[: head.cols], factor, z_CV)
    if rows.lora_hidden is not None:
        assert head.lora_weight is not None
        _product(
            rows.lora_hidden[at].to(dtype), head.lora_weight[: head.cols], factor, z_CV, add=True
        )
    if head.bias is not None:
        z_CV.add_(head.bias[: head.cols], alpha=transform.factor)
    if transform.softcap is not None:
        z_CV.div_(transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)
    return z_CV


def _product(
    hidden_CD: Tensor, weight_VD: Tensor, factor: float, out_CV: Tensor, add: bool = False
) -> None:
    """out = factor * hidden @ weight.T (added where `add`), in out's dtype, which is hidden's. The
    factor meets the finished sums: on the hidden states it would cost them a rounding."""
    slices = [(0, weight_VD)] if weight_VD.dtype == out_CV.dtype else _weight_slices(weight_VD)
    for start, part in slices:
        part_CV = out_CV[:, start : start + len(part)]
        part_DV = part.to(out_CV.dtype).T
        torch.addmm(part_CV, hidden_CD, part_DV, beta=int(add), alpha=factor, out=part_CV)


def _times_weight(grad_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """out = grad @ weight in out's dtype."""
    if weight_VD.dtype == grad_CV.dtype:
        torch.mm(grad_CV, weight_VD, out=out_CD)
        return
    for start, part in _weight_slices(weight_VD):
        out_CD.addmm_(grad_CV[:, start : start + len(part)], part.to(grad_CV.dtype))


def _weight_slices(weight_VD: Tensor) -> Iterator[tuple[int, Tensor]]:
    count = max(1, WEIGHT_SLICE_BYTES // (4 * weight_VD.shape[1]))
    for start in range(0, len(weight_VD), count):
        yield start, weight_VD[start : start + count]
