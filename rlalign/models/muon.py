"""Muon: momentum whose matrix is replaced by the nearest orthogonal one (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon).

    M <- mu M + (1 - mu) G        U = NewtonSchulz(mu M + (1 - mu) G)
    W <- (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(rows, cols)) U

The factor gives U the size of an AdamW update (Liu et al. 2025, arXiv 2502.16982, eq. 4), so both
take the same rate. `torch.optim.Muon` is the same rule; here matrices of one shape go through the
iteration together and in float32, which on a CPU is faster for small ones.

Legend: G gradients, M momentum, U update, each [n, rows, cols] with rows <= cols.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from the source above


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Each matrix of [n, rows, cols], rows <= cols, with its singular values moved near 1.

    Five steps bring them into about [0.7, 1.2]; the directions stay.
    """
    a, b, c = COEFFICIENTS
    x = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """For matrices only; `lr` is on AdamW's scale."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                by_shape[tuple(sorted(param.shape))].append(param)
            for params in by_shape.values():
                self._step_together(params, group)

    def _step_together(self, params: list[Tensor], group: dict) -> None:
        grad = torch.stack([_wide(p.grad) for p in params if p.grad is not None])
        state = self.state[params[0]]
        momentum = state.setdefault("momentum", torch.zeros_like(grad))
        momentum.lerp_(grad, 1 - group["momentum"])
        update = orthogonalize(grad.lerp(momentum, group["momentum"]), group["steps"])
        rate = group["lr"] * 0.2 * math.sqrt(max(grad.shape[1:]))
        for param, change in zip(params, update, strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"])
            _wide(param).sub_(change, alpha=rate)


def _wide(matrix: Tensor) -> Tensor:
    """A view with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
