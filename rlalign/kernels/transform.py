"""What the backends of `linear_logprob` are given, and the way from h . w to a logit.

    z = c(s (h . w + b)) / T,   c(u) = cap * tanh(u / cap), or u without a softcap

Shapes: M rows, D hidden size, V vocabulary, R rank of the head's adapter.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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


class Rows(NamedTuple):
    """The rows to score: `target` [M] int64 is a row of the head, or -1 where it lies elsewhere
    (in another process's part, or nowhere)."""

    hidden: Tensor  # [M, D]
    lora_hidden: Tensor | None  # [M, R], the adapter's input: scale * h A^T
    target: Tensor


class Head(NamedTuple):
    """The head, or this process's part; its first `cols` rows count, the rest is padding."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora_weight: Tensor | None  # [V, R], the adapter's B
    cols: int


class Upstream(NamedTuple):
    """Gradients of the loss with respect to each row's outputs, [M] in the accumulator's dtype."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor | None


class Backward(NamedTuple):
    """How the gradients are made (Triton): through a workspace, or `fused`, which may leave out
    tiles of dL/dz whose every entry is below `filter_eps` times the median of |dL/dlogp|, from the
    gradient of the hidden states, of the head, or of both."""

    fused: bool = False
    filter_eps: float = 0.0
    filter_hidden_grad: bool = False
    filter_weight_grad: bool = False

    @property
    def filtered(self) -> bool:
        return self.filter_hidden_grad or self.filter_weight_grad


class Grads(NamedTuple, Generic[T]):
    """One value for each input that can have a gradient."""

    hidden: T
    weight: T
    bias: T
    lora_hidden: T
    lora_weight: T


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for itself, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
