"""`linear_logprob` as a pair of custom operators: which rows are run, which backend runs them, and
what happens between the processes of a head that is split by rows of the vocabulary.

Forward: rows that are not ignored, statistics of this process's columns, merged over the processes.
Backward: of those, the rows whose upstream gradient is not zero (clipped tokens, groups without
signal, masked tokens cost nothing), their gradient from the saved lse, and one sum of dH over the
processes. Autograd and torch.compile see two operators and nothing within.

Shapes: N tokens, M rows that are run, D hidden size, V rows of the head here, R adapter rank.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

from rlalign.kernels import torch_backend
from rlalign.kernels.partials import Partials, finish, merge
from rlalign.kernels.transform import (
    Backward,
    Grads,
    Head,
    Rows,
    Transform,
    Upstream,
    accumulator,
)


class Options(NamedTuple):
    """What decides the result besides the tensors: the operators' arguments after them."""

    factor: float  # see Transform
    softcap: float | None
    temperature: float
    backend: str  # torch or triton
    ignore_index: int
    entropy: bool
    first_row: int  # of the head here in the whole vocabulary
    vocab_size: int  # of the whole vocabulary, padding excluded
    group: str  # name of the process group that shares the head; empty: none
    reduce_hidden_grad: bool
    chunk_size: int  # torch backend; 0: its own choice
    workspace_bytes: int  # triton backend, as all that follow
    batch_invariant: bool
    fused: bool  # see Backward
    filter_eps: float
    filter_hidden_grad: bool
    filter_weight_grad: bool

    @property
    def transform(self) -> Transform:
        return Transform(self.factor, self.softcap, self.temperature)

    @property
    def how(self) -> Backward:
        return Backward(
            self.fused, self.filter_eps, self.filter_hidden_grad, self.filter_weight_grad
        )


def run(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    lora_hidden_NR: Tensor | None,
    lora_weight_VR: Tensor | None,
    target_N: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy (zeros unless asked for) and lse, [N]; differentiable once."""
    return _forward(
        hidden_ND, weight_VD, bias_V, lora_hidden_NR, lora_weight_VR, target_N, *options
    )[:3]


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, lse and mean logit, [N]."""
    opt = Options(*options)
    valid_M = (target != opt.ignore_index).nonzero()[:, 0]
    rows, head = _operands(hidden, weight, bias, lora_hidden, lora_weight, target, valid_M, opt)
    parts = _backend(opt.backend).statistics(
        rows,
        head,
        opt.transform,
        opt.entropy,
        chunk_size=opt.chunk_size,
        batch_invariant=opt.batch_invariant,
    )
    if opt.group:
        parts = _merge_over_processes(parts, opt.group)
    global_M = target[valid_M]
    stats = finish(parts, (global_M >= 0) & (global_M < opt.vocab_size))
    out = hidden.new_zeros(4, len(target), dtype=accumulator(hidden.dtype))
    out[:, valid_M] = torch.stack(stats)
    if not opt.entropy:
        out[1] = 0
    logp_N, entropy_N, lse_N, mean_N = (x.clone() for x in out)  # outputs may not share memory
    return logp_N, entropy_N, lse_N, mean_N


def backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    lse: Tensor,
    mean: Tensor,
    needs: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs before `target`, an empty tensor for each that none is needed
    of."""
    opt = Options(*options)
    wanted = Grads(*needs)
    given = [g for g in (grad_logp, grad_entropy, grad_lse) if g is not None]
    # a row whose logits are all -inf (lse -inf) has no distribution to move
    active = (target != opt.ignore_index) & (lse != -math.inf)
    active = active & (torch.stack(given) != 0).any(0) if given else torch.zeros_like(active)
    at = active.nonzero()[:, 0]
    rows, head = _operands(hidden, weight, bias, lora_hidden, lora_weight, target, at, opt)
    upstream = Upstream(
        logp=torch.zeros_like(lse[at]) if grad_logp is None else grad_logp[at],
        entropy=None if grad_entropy is None or not opt.entropy else grad_entropy[at],
        lse=None if grad_lse is None else grad_lse[at],
    )
    grads = _backend(opt.backend).gradients(
        rows,
        head,
        opt.transform,
        lse[at],
        mean[at],
        upstream,
        wanted,
        chunk_size=opt.chunk_size,
        workspace_bytes=opt.workspace_bytes,
        how=opt.how,
    )
    return _finished(grads, (hidden, weight, bias, lora_hidden, lora_weight), at, opt)


def _finished(
    grads: Grads[Tensor | None], sources: tuple[Tensor | None, ...], at: Tensor, opt: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all rows, summed over the processes that share the head, in the inputs' dtypes;
    an empty tensor for each that none is needed of."""
    count = len(sources[0]) if sources[0] is not None else 0
    per_row = [_over_all_rows(grad, at, count) for grad in (grads.hidden, grads.lora_hidden)]
    if opt.group and opt.reduce_hidden_grad:
        for grad in per_row:
            if grad is not None:
                dist.all_reduce(grad, group=_process_group(opt.group))
    whole = grads._replace(hidden=per_row[0], lora_hidden=per_row[1])
    outputs = [
        at.new_empty(0, dtype=torch.float32)
        if grad is None or x is None
        else grad.to(x.dtype).contiguous()
        for grad, x in zip(whole, sources, strict=True)
    ]
    return outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]


def _operands(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    at: Tensor,
    opt: Options,
) -> tuple[Rows, Head]:
    """Rows `at`, with targets as rows of the head here, and the head without its padding."""
    cols = max(0, min(len(weight), opt.vocab_size - opt.first_row))
    local = target[at].long() - opt.first_row
    local = torch.where((local >= 0) & (local < cols), local, -1)
    lora = None if lora_hidden is None else _select(lora_hidden, at)
    return Rows(_select(hidden, at), lora, local), Head(weight, bias, lora_weight, cols)


def _select(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` (sorted); all of them without a copy."""
    return x if len(at) == len(x) else x[at]


def _over_all_rows(grad_MD: Tensor | None, at: Tensor, count: int) -> Tensor | None:
    if grad_MD is None or len(at) == count:
        return grad_MD
    return grad_MD.new_zeros(count, grad_MD.shape[1]).index_copy_(0, at, grad_MD)


def _merge_over_processes(parts: Partials, group: str) -> Partials:
    """One exchange of four numbers a row; every process adds them up in the same order."""
    mine = torch.stack(parts)
    process_group = _process_group(group)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, mine, group=process_group)
    return merge(Partials(*torch.stack(everyone, 1)))


def _process_group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore


def _backend(name: str) -> ModuleType:
    if name == "torch":
        return torch_backend
    from rlalign.kernels import triton_backend

    return triton_backend


def _schema(tensors: str, results: int) -> str:
    """Of an operator with these arguments before the options; from the types in Options."""
    names = {float: "float", float | None: "float?", str: "str", int: "SymInt", bool: "bool"}
    options = (f"{names[kind]} {name}" for name, kind in get_type_hints(Options).items())
    return f"({tensors}, {', '.join(options)}) -> ({', '.join(['Tensor'] * results)})"


INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, "
    "Tensor target"
)
UPSTREAM = "Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse"

_forward = torch.library.custom_op(
    "rlalign::linear_logprob", forward, mutates_args=(), schema=_schema(INPUTS, 4)
)
_backward = torch.library.custom_op(
    "rlalign::linear_logprob_backward",
    backward,
    mutates_args=(),
    schema=_schema(f"{UPSTREAM}, {INPUTS}, Tensor lse, Tensor mean, bool[] needs", 5),
)


@_forward.register_fake
def _(hidden, weight, bias, lora_hidden, lora_weight, target, *options):
    dtype = accumulator(hidden.dtype)
    return tuple(hidden.new_empty(len(target), dtype=dtype) for _ in range(4))


@_backward.register_fake
def _(
    grad_logp, grad_entropy, grad_lse, hidden, weight, bias, lora_hidden, lora_weight,
    target, lse, mean, needs, *options,
):  # fmt: skip
    sources = (hidden, weight, bias, lora_hidden, lora_weight)
    return tuple(
        x.new_empty(x.shape) if need and x is not None else target.new_empty(0, dtype=torch.float32)
        for x, need in zip(sources, needs, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[6:]
    ctx.save_for_backward(*inputs[:6], output[2], output[3])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    outputs = _backward(*grads[:3], *ctx.saved_tensors, needs, *ctx.options)
    return *(x if need else None for x, need in zip(outputs, needs, strict=True)), *[None] * (
        1 + len(ctx.options)
    )


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("linear_logprob does not support double backward")


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse)
