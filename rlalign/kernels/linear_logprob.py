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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlalign.kernels import arguments, eager, op
from rlalign.kernels.arguments import Lora, VocabParallel
from rlalign.kernels.transform import Transform

IGNORE_INDEX = -100
FILTERED_PART = 32  # of a dtype's precision, as in arXiv:2411.09009


class LinearLogProbOutput(NamedTuple):
    """`logp`, `entropy` and `lse` (None unless asked for) in nats, shaped like `target`; 0 where
    ignored."""

    logp: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *,
    bias: Tensor | None = None, temperature: float = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False, entropy_grad: bool = True, return_lse: bool = False,
    vocab_size: int | None = None, vocab_parallel: VocabParallel | None = None,
    lora: Lora | None = None, backend: str = "auto", backward: str = "auto",
    chunk_size: int | None = None, workspace_mib: int | None = None,
    filter_eps: float | None = None, filter_hidden_grad: bool = False,
    filter_weight_grad: bool = False, batch_invariant: bool = False,
    deterministic: bool | None = None, validate: bool = False,
) -> LinearLogProbOutput:  # fmt: skip
    """Log-prob of `target` [...] (int64) under softmax of the head's logits for `hidden` [..., D].

    `weight` [V, D], `bias` [V]. `temperature` > 0 divides the logits last. Outputs are float32
    (float64 for float64 inputs). Rows whose target is `ignore_index` give 0 and no gradient; a
    target outside the vocabulary gives NaN, or with `validate` (which waits for the device) a
    ValueError. Rows of the head from `vocab_size` on are padding and have no probability.

    `backend` is `triton` (GPUs), `torch` (tiles of logits, anywhere), `eager` (materialises all
    logits: the reference) or `auto`: what $RLALIGN_KERNEL_BACKEND says, else Triton on a GPU.
    `chunk_size` is the number of rows of a tile of logits in the torch backend (unset: about as
    many as columns, 1024 on a CPU). `workspace_mib` ($RLALIGN_KERNEL_WORKSPACE_MIB, else 256)
    bounds what the Triton backend holds of [N, V] or [V, D] at once, down to 1024 columns.
    `batch_invariant`: a row's result does not depend on the other rows, to the last bit (Triton).

    `backward` (Triton) is `workspace` or `fused`: no part of dL/dz is stored, and the sums are made
    by atomic additions. It may leave out tiles of small gradients, which biases them: where
    `filter_hidden_grad` and `filter_weight_grad` say so, below `filter_eps` times the median
    |dL/dlogp| (unset: a 32nd of the dtype's precision, as in arXiv:2411.09009). `auto` is `fused`
    for that and `workspace` else. `deterministic` (unset: torch.use_deterministic_algorithms)
    refuses `fused`. With `entropy_grad` false the entropy is for information only.

    Gradients reach `hidden`, `weight`, `bias` and `lora` once; differentiating twice raises
    RuntimeError. Raises ValueError for shapes or options that do not fit.
    """
    shard = vocab_parallel or VocabParallel(0, len(weight))
    total = arguments.total_rows(vocab_size, shard, vocab_parallel)
    arguments.check(hidden, weight, target, bias, lora, shard, temperature, softcap, chunk_size)
    if validate:
        arguments.check_targets(target, ignore_index, total)
    chosen = arguments.choose_backend(backend, hidden, weight, *(lora or ()))
    how = arguments.choose_backward(
        backward, chosen, filter_eps, filter_hidden_grad, filter_weight_grad,
        torch.finfo(hidden.dtype).eps / FILTERED_PART, return_entropy and entropy_grad,
        deterministic,
    )  # fmt: skip
    options = op.Options(
        *Transform.of(temperature, logit_scale, softcap), backend=chosen,
        ignore_index=ignore_index, entropy=return_entropy, first_row=shard.start,
        vocab_size=total, reduce_hidden_grad=shard.reduce_hidden_grad,
        group="" if vocab_parallel is None else arguments.group_name(shard.group),
        chunk_size=chunk_size or 0, batch_invariant=batch_invariant,
        workspace_bytes=arguments.choose_workspace_mib(workspace_mib) * 2**20, **how._asdict(),
    )  # fmt: skip
    logp, entropy, lse = _run(hidden, weight, bias, lora, target, options)
    entropy = entropy if entropy_grad else entropy.detach()
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
    run = eager.run if options.backend == "eager" else op.run
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
        function: Callable[..., Any] | None = None,
    ) -> Any:
        """`hidden` [..., D], `target` [...] -> log-probs and entropy, [...] float32; or what a
        `function` that takes the arguments of `linear_logprob` makes of them."""
        if function is None:
            function = partial(linear_logprob, return_entropy=return_entropy)
        return function(
            hidden,
            self.weight,
            target,
            bias=self.bias,
            temperature=temperature,
            lora=self.low_rank(hidden),
            **self.options,
        )

    def low_rank(self, hidden: Tensor) -> Lora | None:
        """What an adapter adds to the head for `hidden` [..., D]; a subclass may have one."""
        return None
