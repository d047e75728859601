"""Per-token log-probability and entropy of a language-model head, without the [N, V] logits.

    z_nv   = c(s * (h_n . w_v + b_v)) / T,   c(u) = cap * tanh(u / cap), or u without a softcap
    logp_n = z_{n, y_n} - lse_n,   lse_n = logsumexp_v z_nv
    H_n    = lse_n - E_n,          E_n = sum_v p_nv z_nv,   p = softmax(z)

Backward, for arbitrary upstream g = dL/dlogp and e = dL/dH of every token:

    dL/dz_nv = g_n (1[v = y_n] - p_nv) - e_n p_nv (z_nv - E_n)

followed by the chain through T, c and s, and two matrix products. Only lse and E are kept between
forward and backward; the logits of a chunk of rows are computed again. Log-probs are computed, not
losses, so that every objective is ordinary autograd on vectors.

Shapes: N tokens, D hidden size, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 * 2**20  # one chunk of fp32 logits
WEIGHT_SLICE_BYTES = 32 * 2**20  # fp32 copy of the part of a half-precision head in use
MIN_CHUNK_ROWS = 16  # fewer rows make the matrix products slow
IGNORE_INDEX = -100
LOWEST = -1e30  # stands for -inf where a zero probability multiplies it: 0 * -inf is NaN


class LinearLogProbOutput(NamedTuple):
    """`logp` and `entropy` (None unless asked for) in nats, shaped like `target`; 0 where
    ignored."""

    logp: Tensor
    entropy: Tensor | None


class _Transform(NamedTuple):
    """What turns h . w + b into z; `factor` = logit_scale, divided by T where there is no
    softcap in between."""

    factor: float
    softcap: float | None
    temperature: float

    @staticmethod
    def of(temperature: float, logit_scale: float, softcap: float | None) -> _Transform:
        factor = logit_scale if softcap is not None else logit_scale / temperature
        return _Transform(factor, softcap, temperature)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> LinearLogProbOutput:
    """Log-prob of `target` [...] (int64) under softmax of the head's logits for `hidden` [..., D].

    `weight` [V, D], `bias` [V]. `temperature` > 0 divides the logits last. Outputs are float32
    (float64 for float64 inputs). Rows whose target is `ignore_index` give 0 and no gradient; a
    target outside [0, V) gives NaN. `chunk_size` is the number of rows whose logits exist at once;
    unset: 64 MiB of them. `backend` is `torch`, `eager` (materialises all logits: the reference)
    or `auto`. Gradients reach `hidden`, `weight` and `bias` once; differentiating twice raises
    RuntimeError. Raises ValueError for shapes or options that do not fit.
    """
    _check(hidden, weight, target, bias, temperature, softcap, chunk_size)
    run = _backend(backend)
    transform = _Transform.of(temperature, logit_scale, softcap)
    hidden_ND, target_N = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits
        logp_N, entropy_N = run(
            hidden_ND, weight, target_N, bias, transform, ignore_index, return_entropy, chunk_size
        )
    entropy = entropy_N.view(target.shape) if return_entropy else None
    return LinearLogProbOutput(logp_N.view(target.shape), entropy)


class LinearLogProb(nn.Module):
    """The head of a language model as a function from hidden states to log-probs.

    Holds the very parameters of `lm_head`, registered here directly so that an engine that
    partitions parameters per module (ZeRO-3) gathers them when this module runs.
    """

    def __init__(
        self, lm_head: nn.Linear, *, logit_scale: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.weight = lm_head.weight
        self.bias = lm_head.bias
        self.logit_scale = logit_scale
        self.softcap = softcap

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        return_entropy: bool = False,
    ) -> LinearLogProbOutput:
        """`hidden` [..., D], `target` [...] -> log-probs and entropy, [...] float32."""
        return linear_logprob(
            hidden,
            self.weight,
            target,
            bias=self.bias,
            temperature=temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            return_entropy=return_entropy,
        )


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
) -> None:
    if hasattr(weight, "full_tensor"):
        raise TypeError("weight is a DTensor; pass weight.full_tensor()")
    if weight.numel() == 0:
        raise RuntimeError(
            "lm_head weight is empty (ZeRO-3 partition); run the head through LinearLogProb, which "
            "owns the parameter, so that the engine gathers it"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has last dim {hidden.shape[-1]}, weight expects {weight.shape[1]}"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target shape {tuple(target.shape)} does not match hidden leading shape "
            f"{tuple(hidden.shape[:-1])}"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target has dtype {target.dtype}, expected int64 or int32")
    if bias is not None and bias.numel() != weight.shape[0]:
        raise ValueError(f"bias has {bias.numel()} entries, weight has {weight.shape[0]} rows")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, not {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, not {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, not {chunk_size}")


def _backend(name: str) -> Any:
    backends = {"auto": _chunked, "torch": _chunked, "eager": _eager}
    if name not in backends:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(backends)}")
    return backends[name]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _eager(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    transform: _Transform,
    ignore_index: int,
    return_entropy: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = _accumulator(hidden_ND.dtype)
    logits_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(dtype)
    logits_NV = logits_NV * transform.factor
    if transform.softcap is not None:
        logits_NV = torch.tanh(logits_NV / transform.softcap) * transform.softcap
        logits_NV = logits_NV / transform.temperature
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    valid_N = target_N != ignore_index
    safe_N, inside_N = _safe_target(target_N, weight_VD.shape[0])
    logp_N = logp_NV.gather(1, safe_N[:, None])[:, 0]
    logp_N = torch.where(inside_N, logp_N, float("nan"))
    entropy_N = -torch.special.xlogy(logp_NV.exp(), logp_NV.exp()).sum(-1)
    zero = logp_N.new_zeros(())
    return torch.where(valid_N, logp_N, zero), torch.where(valid_N, entropy_N, zero)


def _safe_target(target_N: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    inside_N = (target_N >= 0) & (target_N < vocab_size)
    return torch.where(inside_N, target_N, 0).long(), inside_N


def _chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    transform: _Transform,
    ignore_index: int,
    return_entropy: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    rows = chunk_size or max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    return _ChunkedLogProb.apply(
        hidden_ND, weight_VD, bias_V, target_N, transform, ignore_index, return_entropy, rows
    )


class _ChunkedLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        transform: _Transform,
        ignore_index: int,
        return_entropy: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = _accumulator(hidden_ND.dtype)
        logp_N, lse_N, entropy_N, mean_N = (
            hidden_ND.new_zeros(len(target_N), dtype=dtype) for _ in range(4)
        )
        valid = (target_N != ignore_index).nonzero()[:, 0]
        for at in valid.split(rows):
            logits_CV = _logits(_rows(hidden_ND, at), weight_VD, bias_V, transform)
            statistics = _statistics(logits_CV, target_N[at], return_entropy)
            for out_N, value_C in zip((logp_N, lse_N, entropy_N, mean_N), statistics, strict=True):
                out_N[at] = value_C
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, lse_N, mean_N)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, entropy and mean logit [C] of logits [C, V], which are overwritten."""
    safe_C, inside_C = _safe_target(target_C, logits_CV.shape[1])
    chosen_C = logits_CV.gather(1, safe_C[:, None])[:, 0]
    max_C = logits_CV.amax(1)
    max_C = max_C.masked_fill(max_C == -math.inf, 0)
    shifted_CV = logits_CV.sub_(max_C[:, None])
    if not with_entropy:
        lse_C = shifted_CV.exp_().sum(1).log_().add_(max_C)
        entropy_C = mean_C = torch.zeros_like(lse_C)
    else:
        # the shifted moment: lse - sum(p z) would lose digits to cancellation at large logits
        shifted_CV.clamp_min_(LOWEST)
        exp_CV = shifted_CV.exp()
        sum_C, moment_C = exp_CV.sum(1), exp_CV.mul_(shifted_CV).sum(1)
        offset_C = torch.where(sum_C == 0, 0, moment_C / sum_C)
        lse_C = sum_C.log() + max_C
        mean_C = max_C + offset_C
        entropy_C = torch.where(sum_C == 0, 0, sum_C.log() - offset_C)
    lse_C = torch.where(inside_C, lse_C, math.nan)  # poisons the row's gradient as well
    logp_C = torch.where(lse_C == -math.inf, lse_C, chosen_C - lse_C)
    return logp_C, lse_C, entropy_C, mean_C


def _backward(
    ctx: Any, grad_logp_N: Tensor | None, grad_entropy_N: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; those that nobody needs are None and cost nothing."""
    hidden_ND, weight_VD, bias_V, target_N, lse_N, mean_N = ctx.saved_tensors
    transform, ignore_index, return_entropy, rows = ctx.options
    grad_logp_N = torch.zeros_like(lse_N) if grad_logp_N is None else grad_logp_N
    grad_entropy_N = grad_entropy_N if return_entropy else None
    # a row whose logits are all -inf (lse -inf) has no distribution to move
    active_N = (target_N != ignore_index) & (lse_N != -math.inf)
    # clipped and masked tokens cost nothing
    active_N &= (
        grad_logp_N != 0 if grad_entropy_N is None else (grad_logp_N != 0) | (grad_entropy_N != 0)
    )
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dtype = lse_N.dtype
    # accumulated in fp32: sums over chunks in bf16 lose two digits
    grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
    grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
    grad_bias = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
    for at in active_N.nonzero()[:, 0].split(rows):
        hidden_CD = _rows(hidden_ND, at)
        logits_CV = _logits(hidden_CD, weight_VD, bias_V, transform)
        grad_CV = _grad_preactivation(
            logits_CV,
            target_N[at],
            lse_N[at],
            mean_N[at],
            grad_logp_N[at],
            None if grad_entropy_N is None else grad_entropy_N[at],
            transform,
        )
        if grad_hidden is not None:
            grad_hidden[at] = _times_weight(grad_CV, weight_VD).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight.addmm_(grad_CV.T, hidden_CD.to(dtype))
        if grad_bias is not None:
            grad_bias += grad_CV.sum(0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight_VD.dtype),
        None if grad_bias is None else grad_bias.to(bias_V.dtype),
    )


def _grad_preactivation(
    logits_CV: Tensor,
    target_C: Tensor,
    lse_C: Tensor,
    mean_C: Tensor,
    grad_logp_C: Tensor,
    grad_entropy_C: Tensor | None,
    transform: _Transform,
) -> Tensor:
    """dL/d(h . w + b) [C, V]; without a softcap the logits' own memory holds it."""
    softcap, temperature = transform.softcap, transform.temperature
    slope = transform.factor if softcap is None else transform.factor / temperature
    ratio_CV = None if softcap is None else logits_CV * (temperature / softcap)
    if grad_entropy_C is None:
        grad_CV = logits_CV.sub_(lse_C[:, None]).exp_().mul_((-slope * grad_logp_C)[:, None])
    else:
        probs_CV = (logits_CV - lse_C[:, None]).exp_()
        centred_CV = logits_CV.sub_(mean_C[:, None]).clamp_min_(LOWEST)
        upstream_CV = centred_CV.mul_((-slope * grad_entropy_C)[:, None])
        grad_CV = upstream_CV.sub_((slope * grad_logp_C)[:, None]).mul_(probs_CV)
    safe_C, _ = _safe_target(target_C, grad_CV.shape[1])
    grad_CV.scatter_add_(1, safe_C[:, None], (slope * grad_logp_C)[:, None])
    if ratio_CV is not None:
        grad_CV.mul_(ratio_CV.square_().neg_().add_(1))
    return grad_CV


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, transform: _Transform
) -> Tensor:
    """z [C, V] in the accumulator's dtype, never rounded to half precision."""
    hidden_CD = hidden_CD.to(_accumulator(hidden_CD.dtype))
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


def _weight_slices(weight_VD: Tensor) -> Any:
    rows = max(1, WEIGHT_SLICE_BYTES // (4 * weight_VD.shape[1]))
    for start in range(0, len(weight_VD), rows):
        yield start, weight_VD[start : start + rows]


def _rows(hidden_ND: Tensor, at: Tensor) -> Tensor:
    """Rows `at` (sorted); all of them without a copy."""
    return hidden_ND if len(at) == len(hidden_ND) else hidden_ND[at]
