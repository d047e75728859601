"""Per-token log-probability and entropy of a language-model head, without the [N, V] logits.

    z_nv   = c(s * (h_n . w_v + b_v)) / T,   c(u) = cap * tanh(u / cap), or u without a softcap
    logp_n = z_{n, y_n} - lse_n,   lse_n = logsumexp_v z_nv
    H_n    = lse_n - E_n,          E_n = sum_v p_nv z_nv,   p = softmax(z)

Backward, for arbitrary upstream g = dL/dlogp, e = dL/dH and l = dL/dlse of every token:

    dL/dz_nv = g_n (1[v = y_n] - p_nv) - e_n p_nv (z_nv - E_n) + l_n p_nv

followed by the chain through T, c and s, and two matrix products. Log-probs are computed, not
losses, so that every objective is ordinary autograd on vectors. Logits exist in fp32 tiles only:
rounded to bfloat16 they would move a log-prob by 1 to 2 %.

Shapes: N tokens, D hidden size, V vocabulary, R rank of an adapter on the head.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlalign.kernels import op
from rlalign.kernels.transform import Transform, accumulator

IGNORE_INDEX = -100
WORKSPACE_MIB = 256
BACKENDS = ("auto", "triton", "torch", "eager")
BACKEND_VARIABLE = "RLALIGN_KERNEL_BACKEND"
WORKSPACE_VARIABLE = "RLALIGN_KERNEL_WORKSPACE_MIB"


class LinearLogProbOutput(NamedTuple):
    """`logp`, `entropy` and `lse` (None unless asked for) in nats, shaped like `target`; 0 where
    ignored."""

    logp: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None


@dataclass(frozen=True)
class VocabParallel:
    """The head's rows [start, stop) of the whole vocabulary are here, the others with the other
    processes of `group` (None: the default one). Targets are rows of the whole vocabulary.

    `reduce_hidden_grad` sums the gradient of the hidden states over the group; switch it off where
    the framework does so itself.
    """

    start: int
    stop: int
    group: Any = None
    reduce_hidden_grad: bool = True


class Lora(NamedTuple):
    """A low-rank part of the head: logits gain `hidden` @ `weight`^T, before bias and scale.

    `hidden` [..., R] is scale * h A^T, made outside, so that A has its gradient by autograd;
    `weight` [V, R] is B.
    """

    hidden: Tensor
    weight: Tensor


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
    return_lse: bool = False,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    lora: Lora | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    workspace_mib: int | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
) -> LinearLogProbOutput:
    """Log-prob of `target` [...] (int64) under softmax of the head's logits for `hidden` [..., D].

    `weight` [V, D], `bias` [V]. `temperature` > 0 divides the logits last. Outputs are float32
    (float64 for float64 inputs). Rows whose target is `ignore_index` give 0 and no gradient; a
    target outside the vocabulary gives NaN, or with `validate` (which waits for the device) a
    ValueError. Rows of the head from `vocab_size` on are padding and have no probability.

    `backend` is `triton` (GPUs), `torch` (chunks of rows, anywhere), `eager` (materialises all
    logits: the reference) or `auto`: what $RLALIGN_KERNEL_BACKEND says, else Triton on a GPU.
    `chunk_size` is the number of rows whose logits exist at once in the torch backend (unset: a few
    MiB of them). `workspace_mib` ($RLALIGN_KERNEL_WORKSPACE_MIB, else 256) bounds the piece of
    dL/dz that exists at once in the Triton backend, down to 1024 columns of it.
    `batch_invariant`: a row's result does not depend on the other rows, to the last bit (Triton).

    Gradients reach `hidden`, `weight`, `bias` and `lora` once; differentiating twice raises
    RuntimeError. Raises ValueError for shapes or options that do not fit.
    """
    shard = vocab_parallel or VocabParallel(0, len(weight))
    total = _total_rows(vocab_size, shard, vocab_parallel)
    _check(hidden, weight, target, bias, lora, temperature, softcap, chunk_size, shard)
    if validate:
        _check_targets(target, ignore_index, total)
    options = op.Options(
        *Transform.of(temperature, logit_scale, softcap),
        backend=choose_backend(backend, hidden, weight, *(lora or ())),
        ignore_index=ignore_index,
        entropy=return_entropy,
        first_row=shard.start,
        vocab_size=total,
        group="" if vocab_parallel is None else _group_name(shard.group),
        reduce_hidden_grad=shard.reduce_hidden_grad,
        chunk_size=chunk_size or 0,
        workspace_bytes=_workspace_mib(workspace_mib) * 2**20,
        batch_invariant=batch_invariant,
    )
    logp, entropy, lse = _run(hidden, weight, bias, lora, target, options)
    return LinearLogProbOutput(
        logp, entropy if return_entropy else None, lse if return_lse else None
    )


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    target: Tensor,
    options: op.Options,
) -> list[Tensor]:
    """logp, entropy and lse, shaped like `target`."""
    rows_ND = hidden.reshape(-1, hidden.shape[-1])
    lora_NR = None if lora is None else lora.hidden.reshape(-1, lora.hidden.shape[-1])
    lora_VR = None if lora is None else lora.weight
    run = _eager if options.backend == "eager" else op.run
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits
        outputs = run(rows_ND, weight, bias, lora_NR, lora_VR, target.reshape(-1), options)
    return [output.view(target.shape) for output in outputs]


class LinearLogProb(nn.Module):
    """The head of a language model as a function from hidden states to log-probs.

    Holds the very parameters of `lm_head`, registered here directly so that an engine that
    partitions parameters per module (ZeRO-3) gathers them when this module runs.
    """

    def __init__(
        self,
        lm_head: nn.Linear,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        **options: Any,
    ) -> None:
        """`options` are further arguments of every call of `linear_logprob`: `backend`, ..."""
        super().__init__()
        self.weight = lm_head.weight
        self.bias = lm_head.bias
        self.options: dict[str, Any] = {**options, "logit_scale": logit_scale, "softcap": softcap}

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
            return_entropy=return_entropy,
            lora=self.low_rank(hidden),
            **self.options,
        )

    def low_rank(self, hidden: Tensor) -> Lora | None:
        """What an adapter adds to the head for `hidden` [..., D]; a subclass may have one."""
        return None


def choose_backend(name: str, *operands: Tensor) -> str:
    """The backend that `name` stands for with these factors of matrix products, hidden states
    first. Raises ValueError for an unknown one, and for Triton where it cannot run."""
    if name == "auto":
        name = os.environ.get(BACKEND_VARIABLE, "auto")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    problem = _triton_problem(*operands) if name in ("auto", "triton") else ""
    if name == "triton" and problem:
        raise ValueError(f"backend 'triton' cannot run here: {problem}; use 'torch'")
    return ("torch" if problem else "triton") if name == "auto" else name


def _triton_problem(hidden: Tensor, *others: Tensor) -> str:
    """Why the Triton backend cannot take these factors; nothing where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {hidden.device.type}"
    if hidden.dtype == torch.float64 or any(x.dtype != hidden.dtype for x in others):
        return f"hidden is {hidden.dtype}, the others {', '.join(str(x.dtype) for x in others)}"
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return f"{torch.cuda.get_device_name(hidden.device)} is older than Ampere"
    return ""


def _total_rows(given: int | None, shard: VocabParallel, parallel: VocabParallel | None) -> int:
    if given is None and parallel is not None:
        raise ValueError("vocab_parallel needs vocab_size, the rows of the whole vocabulary")
    return shard.stop if given is None else given


def _group_name(group: Any) -> str:
    import torch.distributed as dist

    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("vocab_parallel needs an initialised torch.distributed process group")
    return group.group_name


def _workspace_mib(given: int | None) -> int:
    mib = int(os.environ.get(WORKSPACE_VARIABLE, WORKSPACE_MIB)) if given is None else given
    if mib < 1:
        raise ValueError(f"workspace_mib must be >= 1, not {mib}")
    return mib


def _check_targets(target: Tensor, ignore_index: int, vocab_size: int) -> None:
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} targets are outside the vocabulary of {vocab_size}, the first is "
            f"{int(target[wrong][0])}"
        )


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
    shard: VocabParallel,
) -> None:
    if hasattr(weight, "full_tensor"):
        raise TypeError("weight is a DTensor; pass weight.full_tensor(), or VocabParallel(...)")
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
    if lora is not None:
        wanted = ((*target.shape, lora.weight.shape[1]), (len(weight), lora.hidden.shape[-1]))
        if (tuple(lora.hidden.shape), tuple(lora.weight.shape)) != wanted:
            raise ValueError(
                f"lora has hidden {tuple(lora.hidden.shape)} and weight "
                f"{tuple(lora.weight.shape)}, expected [{', '.join(map(str, target.shape))}, R] "
                f"and [{len(weight)}, R]"
            )
    if shard.stop - shard.start != len(weight):
        raise ValueError(f"vocab shard [{shard.start},{shard.stop}) has {len(weight)} rows")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, not {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, not {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, not {chunk_size}")


def _eager(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    lora_hidden_NR: Tensor | None,
    lora_weight_VR: Tensor | None,
    target_N: Tensor,
    options: op.Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """All logits at once, differentiated by autograd: what the others are measured against."""
    if options.group:
        raise ValueError("backend 'eager' does not know a head split over processes")
    dtype, transform = accumulator(hidden_ND.dtype), options.transform
    logits_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).T
    if lora_hidden_NR is not None and lora_weight_VR is not None:
        logits_NV = logits_NV + lora_hidden_NR.to(dtype) @ lora_weight_VR.to(dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(dtype)
    logits_NV = logits_NV * transform.factor
    if transform.softcap is not None:
        logits_NV = torch.tanh(logits_NV / transform.softcap) * transform.softcap
        logits_NV = logits_NV / transform.temperature
    logits_NV = logits_NV[:, : options.vocab_size]
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    valid_N = target_N != options.ignore_index
    inside_N = (target_N >= 0) & (target_N < options.vocab_size)
    safe_N = torch.where(inside_N, target_N, 0).long()
    logp_N = torch.where(inside_N, logp_NV.gather(1, safe_N[:, None])[:, 0], math.nan)
    entropy_N = -torch.special.xlogy(logp_NV.exp(), logp_NV.exp()).sum(-1)
    zero = logp_N.new_zeros(())
    outputs = (logp_N, entropy_N, logits_NV.logsumexp(-1))
    logp_N, entropy_N, lse_N = (torch.where(valid_N, x, zero) for x in outputs)
    return logp_N, entropy_N, lse_N
