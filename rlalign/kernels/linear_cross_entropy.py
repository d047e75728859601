"""`linear_cross_entropy`: the negative log-prob under the argument names of cut-cross-entropy
(arXiv:2411.09009), for code that was written for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlalign.kernels.linear_logprob import IGNORE_INDEX, linear_logprob

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    filter_eps: float | str | None = None,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    **options: Any,
) -> Tensor:
    """-ln p of `targets` [...] for embeddings `e` [..., D] and the classifier `c` [V, D], nats.

    `reduction` is `mean` over the targets that are not ignored (NaN where all are, as in torch),
    `sum`, or `none`. Gradients are exact unless `filter_eps` is given (`"auto"`: a 32nd of the
    dtype's precision); then small ones are left out of those of `e` and `c`, as far as
    `filter_e_grad` and `filter_c_grad` say. `options` are further ones of `linear_logprob`.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    if isinstance(filter_eps, str) and filter_eps != "auto":
        raise ValueError(f"filter_eps must be a number, 'auto' or None, not {filter_eps!r}")
    if filter_eps is not None and (filter_e_grad or filter_c_grad):
        options |= {"filter_hidden_grad": filter_e_grad, "filter_weight_grad": filter_c_grad}
        options |= {} if isinstance(filter_eps, str) else {"filter_eps": filter_eps}
    nll = -linear_logprob(
        e, c, targets, bias=bias, ignore_index=ignore_index, softcap=softcap, **options
    ).logp
    if reduction == "none":
        return nll
    return nll.sum() if reduction == "sum" else nll.sum() / (targets != ignore_index).sum()
