"""What the arguments of `linear_logprob` must be, and what those stand for that are left open."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlalign.kernels.transform import Backward

WORKSPACE_MIB = 256
BACKENDS = ("auto", "triton", "torch", "eager")
BACKWARDS = ("auto", "workspace", "fused")
BACKEND_VARIABLE = "RLALIGN_KERNEL_BACKEND"
WORKSPACE_VARIABLE = "RLALIGN_KERNEL_WORKSPACE_MIB"


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


def choose_backward(
    name: str,
    backend: str,
    filter_eps: float | None,
    filter_hidden_grad: bool,
    filter_weight_grad: bool,
    default_eps: float,
    entropy_grad: bool,
    deterministic: bool | None,
) -> Backward:
    """The backward pass that `name` stands for. Raises ValueError for an unknown one, and where it
    cannot do what is asked of it."""
    if name not in BACKWARDS:
        raise ValueError(f"unknown backward {name!r}; choose one of {', '.join(BACKWARDS)}")
    filtered = filter_hidden_grad or filter_weight_grad
    if filter_eps is not None and not filtered:
        raise ValueError("filter_eps needs filter_hidden_grad=True or filter_weight_grad=True")
    if filter_eps is not None and not (math.isfinite(filter_eps) and filter_eps >= 0):
        raise ValueError(f"filter_eps must be finite and >= 0, not {filter_eps}")
    if filtered and entropy_grad:
        raise ValueError(
            "gradient filtering is biased for entropy gradients; leave filter_eps, "
            "filter_hidden_grad and filter_weight_grad unset, or pass entropy_grad=False"
        )
    if filtered and name == "workspace":
        raise ValueError("backward 'workspace' leaves no gradient out; use 'fused' or 'auto'")
    if name != "fused" and not filtered:
        return Backward()
    if backend != "triton":
        raise ValueError(f"a fused or filtered backward needs backend 'triton', not {backend!r}")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        raise ValueError("a fused or filtered backward adds in any order; it is not deterministic")
    eps = default_eps if filter_eps is None else filter_eps
    return Backward(True, eps if filtered else 0.0, filter_hidden_grad, filter_weight_grad)


def total_rows(given: int | None, shard: VocabParallel, parallel: VocabParallel | None) -> int:
    if given is None and parallel is not None:
        raise ValueError("vocab_parallel needs vocab_size, the rows of the whole vocabulary")
    return shard.stop if given is None else given


def group_name(group: Any) -> str:
    import torch.distributed as dist

    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("vocab_parallel needs an initialised torch.distributed process group")
    return group.group_name


def choose_workspace_mib(given: int | None) -> int:
    mib = int(os.environ.get(WORKSPACE_VARIABLE, WORKSPACE_MIB)) if given is None else given
    if mib < 1:
        raise ValueError(f"workspace_mib must be >= 1, not {mib}")
    return mib


def check_targets(target: Tensor, ignore_index: int, vocab_size: int) -> None:
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} targets are outside the vocabulary of {vocab_size}, the first is "
            f"{int(target[wrong][0])}"
        )


def check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    shard: VocabParallel,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
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
