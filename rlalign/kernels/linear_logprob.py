"""Per-token log-probability and entropy of a language-model head, without the [N, V] logits.

    z_nv   = c(s * (h_n . w_v + b_v)) / T,   c(u) = cap * tanh(u / cap), or u without a softcap
    logp_n = z_{n, y_n} - lse_n,   lse_n = logsumexp_v z_nv
    H_n    = lse_n - E_n,          E_n = sum_v p_nv z_nv,   p = softmax(z)

Backward, for arbitrary upstream g = dL/dlogp and e = dL/dH of every token:

    dL/dz_nv = g_n (1[v = y_n] - p_nv) - e_n p_nv (z_nv - E_n)

followed by the chain through T, c and s, and two matrix products; kernels/chunked.py does it by
chunks of rows. Log-probs are computed, not losses, so that every objective is ordinary autograd on
vectors.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlalign.kernels.chunked import Transform, accumulator, chunked_logprob, safe_target

IGNORE_INDEX = -100


class LinearLogProbOutput(NamedTuple):
    """`logp` and `entropy` (None unless asked for) in nats, shaped like `target`; 0 where
    ignored."""

    logp: Tensor
    entropy: Tensor | None


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
    unset: a few MiB of them. `backend` is `torch`, `eager` (materialises all logits: the reference)
    or `auto`. Gradients reach `hidden`, `weight` and `bias` once; differentiating twice raises
    RuntimeError. Raises ValueError for shapes or options that do not fit.
    """
    _check(hidden, weight, target, bias, temperature, softcap, chunk_size)
    run = _backend(backend)
    transform = Transform.of(temperature, logit_scale, softcap)
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


def _backend(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    backends = {"auto": chunked_logprob, "torch": chunked_logprob, "eager": _eager}
    if name not in backends:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(backends)}")
    return backends[name]


def _eager(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    transform: Transform,
    ignore_index: int,
    return_entropy: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = accumulator(hidden_ND.dtype)
    logits_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(dtype)
    logits_NV = logits_NV * transform.factor
    if transform.softcap is not None:
        logits_NV = torch.tanh(logits_NV / transform.softcap) * transform.softcap
        logits_NV = logits_NV / transform.temperature
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    valid_N = target_N != ignore_index
    safe_N, inside_N = safe_target(target_N, weight_VD.shape[0])
    logp_N = logp_NV.gather(1, safe_N[:, None])[:, 0]
    logp_N = torch.where(inside_N, logp_N, float("nan"))
    entropy_N = -torch.special.xlogy(logp_NV.exp(), logp_NV.exp()).sum(-1)
    zero = logp_N.new_zeros(())
    return torch.where(valid_N, logp_N, zero), torch.where(valid_N, entropy_N, zero)
