"""The plain-torch backend of `linear_logprob`: chunks of rows, forward and backward by hand.

Forward keeps lse and the entropy H of each row. Backward computes the logits of a chunk again and
turns that buffer into the gradient, with p = softmax(z):

    dL/dz_v = g (1[v = y] - p_v) - e p_v (ln p_v + H)

Where the probabilities of all rows fit into KEEP_BYTES they are kept instead, in chunks: the third
matrix product would cost more than the memory is worth. Rows that are ignored, and rows whose
upstream gradients are zero, cost nothing.

Shapes: N tokens, D hidden size, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # fp32 logits that exist at once, at most
CACHE_BYTES = 4 * 2**20  # a CPU is quicker on chunks near its caches
CACHE_ROWS = 256  # but the head's gradient is read and written once per chunk
MIN_ROWS = 16  # fewer rows make the matrix products slow
KEEP_BYTES = 64 * 2**20
WEIGHT_SLICE_BYTES = 32 * 2**20  # fp32 copy of the part of a half-precision head in use
LOWEST = -1e30  # stands for -inf where a zero probability multiplies it: 0 * -inf is NaN


class Transform(NamedTuple):
    """What turns h . w + b into z: times `factor`, then (softcap only) cap * tanh(. / cap) / T."""

    factor: float
    softcap: float | None
    temperature: float

    @staticmethod
    def of(temperature: float, logit_scale: float, softcap: float | None) -> Transform:
        factor = logit_scale if softcap is not None else logit_scale / temperature
        return Transform(factor, softcap, temperature)

    @property
    def slope(self) -> float:
        """dz / d(h . w + b) at 0."""
        return self.factor if self.softcap is None else self.factor / self.temperature


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for itself, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def safe_target(target_N: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """`target_N` as int64 with 0 where it is outside the vocabulary, and where it is inside."""
    inside_N = (target_N >= 0) & (target_N < vocab_size)
    return torch.where(inside_N, target_N, 0).long(), inside_N


def chunked_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    transform: Transform,
    ignore_index: int,
    return_entropy: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """logp [N] and entropy [N] (zeros unless `return_entropy`), differentiable once."""
    rows = chunk_size or _default_rows(len(weight_VD), hidden_ND.device.type)
    return _ChunkedLogProb.apply(
        hidden_ND, weight_VD, bias_V, target_N, transform, ignore_index, return_entropy, rows
    )


def _default_rows(vocab_size: int, device: str) -> int:
    most = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * vocab_size)
    if device == "cpu":
        most = min(most, max(CACHE_ROWS, CACHE_BYTES // (4 * vocab_size)))
    return max(MIN_ROWS, most)


class _ChunkedLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        transform: Transform,
        ignore_index: int,
        return_entropy: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulator(hidden_ND.dtype)
        logp_N, entropy_N, lse_N = (
            hidden_ND.new_zeros(len(target_N), dtype=dtype) for _ in range(3)
        )
        valid_M = (target_N != ignore_index).nonzero()[:, 0]
        keep = any(ctx.needs_input_grad) and transform.softcap is None
        keep = keep and len(valid_M) * len(weight_VD) * dtype.itemsize <= KEEP_BYTES
        kept: list[Tensor] = []
        for at in valid_M.split(rows):
            logits_CV = _logits(_rows(hidden_ND, at), weight_VD, bias_V, transform)
            logp_N[at], lse_N[at], entropy_N[at], *chunk = _statistics(
                logits_CV, target_N[at], return_entropy
            )
            if keep:
                kept += chunk
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, lse_N, entropy_N, *kept)
        ctx.options = (transform, ignore_index, return_entropy, rows)
        ctx.set_materialize_grads(False)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logprob does not support double backward")
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return (*_backward(ctx, *grad_outputs), *[None] * 5)


def _statistics(
    logits_CV: Tensor, target_C: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | float, Tensor, Tensor]:
    """logp, lse, entropy [C] of logits [C, V], which are overwritten; exp(z - max), its sums."""
    safe_C, inside_C = safe_target(target_C, logits_CV.shape[1])
    chosen_C = logits_CV.gather(1, safe_C[:, None])[:, 0]
    max_C = logits_CV.amax(1)
    max_C = max_C.masked_fill(max_C == -math.inf, 0)
    shifted_CV = logits_CV.sub_(max_C[:, None])
    if with_entropy:
        # the shifted moment: lse - sum(p z) would lose digits to cancellation at large logits
        exp_CV = shifted_CV.exp()
        sum_C = exp_CV.sum(1)
        offset_C = shifted_CV.clamp_min_(LOWEST).mul_(exp_CV).sum(1) / sum_C
        entropy_C = torch.where(sum_C == 0, 0, sum_C.log() - offset_C)
    else:
        exp_CV = shifted_CV.exp_()
        sum_C, entropy_C = exp_CV.sum(1), 0.0
    # a target outside the vocabulary poisons its row, the row's gradient included
    lse_C = torch.where(inside_C, sum_C.log() + max_C, math.nan)
    logp_C = torch.where(lse_C == -math.inf, lse_C, chosen_C - lse_C)
    return logp_C, lse_C, entropy_C, exp_CV, torch.where(inside_C, sum_C, math.nan)


def _backward(
    ctx: Any, grad_logp_N: Tensor | None, grad_entropy_N: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; those that nobody needs are None and cost nothing."""
    hidden_ND, weight_VD, bias_V, *_ = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dtype = accumulator(hidden_ND.dtype)
    # accumulated in fp32: sums over chunks in bf16 lose two digits
    grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
    grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
    grad_bias = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
    for at, grad_CV in _grad_chunks(ctx, grad_logp_N, grad_entropy_N):
        if grad_hidden is not None:
            grad_hidden[at] = _times_weight(grad_CV, weight_VD).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight.addmm_(grad_CV.T, _rows(hidden_ND, at).to(dtype))
        if grad_bias is not None:
            grad_bias += grad_CV.sum(0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight_VD.dtype),
        None if grad_bias is None else grad_bias.to(bias_V.dtype),
    )


def _grad_chunks(
    ctx: Any, grad_logp_N: Tensor | None, grad_entropy_N: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows with gradient, and dL/d(h . w + b) [C, V] of them, chunk by chunk."""
    hidden_ND, weight_VD, bias_V, target_N, lse_N, entropy_N, *kept = ctx.saved_tensors
    transform, ignore_index, return_entropy, rows = ctx.options
    scale = transform.slope if transform.softcap is None else 1.0
    g_N = torch.zeros_like(lse_N) if grad_logp_N is None else grad_logp_N * scale
    e_N = grad_entropy_N * scale if return_entropy and grad_entropy_N is not None else None
    active_N = (g_N != 0) if e_N is None else (g_N != 0) | (e_N != 0)
    # a row whose logits are all -inf (lse -inf) has no distribution to move
    active_N &= (target_N != ignore_index) & (lse_N != -math.inf)

    def gradient(at: Tensor, logp_CV: Tensor | None, probs_CV: Tensor) -> Tensor:
        e_C = None if e_N is None else e_N[at]
        return _grad_logits(logp_CV, probs_CV, target_N[at], g_N[at], e_C, entropy_N[at])

    if kept:
        valid_M = (target_N != ignore_index).nonzero()[:, 0]
        for at, exp_CV, sum_C in zip(valid_M.split(rows), kept[::2], kept[1::2], strict=True):
            live = active_N[at].nonzero()[:, 0]
            probs_CV = _rows(exp_CV, live) / sum_C[live][:, None]
            logp_CV = None if e_N is None else probs_CV.log()
            yield at[live], gradient(at[live], logp_CV, probs_CV)
        return
    for at in active_N.nonzero()[:, 0].split(rows):
        logits_CV = _logits(_rows(hidden_ND, at), weight_VD, bias_V, transform)
        slope_CV = None if transform.softcap is None else _softcap_slope(logits_CV, transform)
        logp_CV = logits_CV.sub_(lse_N[at][:, None])
        probs_CV = logp_CV.exp_() if e_N is None else logp_CV.exp()
        grad_CV = gradient(at, logp_CV, probs_CV)
        yield at, grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)


def _grad_logits(
    logp_CV: Tensor | None,
    probs_CV: Tensor,
    target_C: Tensor,
    g_C: Tensor,
    e_C: Tensor | None,
    entropy_C: Tensor,
) -> Tensor:
    """dL/dz [C, V], in the memory of `probs_CV`; `logp_CV` is overwritten."""
    if e_C is None:
        grad_CV = probs_CV.mul_(-g_C[:, None])
    else:
        assert logp_CV is not None
        upstream_CV = logp_CV.clamp_min_(LOWEST).add_(entropy_C[:, None]).mul_(e_C[:, None])
        grad_CV = probs_CV.mul_(upstream_CV.add_(g_C[:, None]).neg_())
    safe_C, _ = safe_target(target_C, grad_CV.shape[1])
    return grad_CV.scatter_add_(1, safe_C[:, None], g_C[:, None])


def _softcap_slope(logits_CV: Tensor, transform: Transform) -> Tensor:
    """dz / d(h . w + b) at each logit: slope * (1 - (z T / cap)^2)."""
    assert transform.softcap is not None
    ratio_CV = logits_CV * (transform.temperature / transform.softcap)
    return ratio_CV.square_().neg_().add_(1).mul_(transform.slope)


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, transform: Transform
) -> Tensor:
    """z [C, V] in the accumulator's dtype, never rounded to half precision."""
    hidden_CD = hidden_CD.to(accumulator(hidden_CD.dtype))
    logits_CV = _matmul(
        hidden_CD if transform.factor == 1 else hidden_CD * transform.factor, weight_VD
    )
    if bias_V is not None:
        logits_CV.add_(bias_V, alpha=transform.factor)
    if transform.softcap is not None:
        logits_CV.div_(transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)
    return logits_CV


def _matmul(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T in hidden's dtype, the accumulator's."""
    dtype = hidden_CD.dtype
    if weight_VD.dtype == dtype:
        return hidden_CD @ weight_VD.T
    out_CV = hidden_CD.new_empty(len(hidden_CD), len(weight_VD))
    for start, part in _weight_slices(weight_VD):
        torch.mm(hidden_CD, part.to(dtype).T, out=out_CV[:, start : start + len(part)])
    return out_CV


def _times_weight(grad_CV: Tensor, weight_VD: Tensor) -> Tensor:
    if weight_VD.dtype == grad_CV.dtype:
        return grad_CV @ weight_VD
    out_CD = grad_CV.new_zeros(len(grad_CV), weight_VD.shape[1])
    for start, part in _weight_slices(weight_VD):
        out_CD.addmm_(grad_CV[:, start : start + len(part)], part.to(grad_CV.dtype))
    return out_CD


def _weight_slices(weight_VD: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, WEIGHT_SLICE_BYTES // (4 * weight_VD.shape[1]))
    for start in range(0, len(weight_VD), rows):
        yield start, weight_VD[start : start + rows]


def _rows(hidden_ND: Tensor, at: Tensor) -> Tensor:
    """Rows `at` (sorted); all of them without a copy."""
    return hidden_ND if len(at) == len(hidden_ND) else hidden_ND[at]
