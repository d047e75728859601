"""Policy gradient on latents: the vectors that a language-model head reads are the parameters.

    pi(v | z) = softmax(cap(scale * (W z + b)))_v
    dJ / dz_t = r * d log pi(a_t | z_t) / dz_t = r * scale * W^T (cap' * (onehot(a_t) - pi))

With `a` the tokens that earned the reward r, at each position on its own (LatentSeek, Li et al.
2025, https://arxiv.org/abs/2505.13308). No autograd is needed: the gradient is closed.

Adam's first step is lr in every coordinate, along the gradient's sign, whatever the size of r; and
where pi(a_t | z_t) is almost 1 it is still lr. bfloat16 loses a step of 0.03 on a coordinate of 8.

Shapes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # logits over the vocabulary that exist at once


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A language-model head: `weight_VD` and `bias_V` (or None) as the model has them, the factor
    of its logits, and the value that tanh caps them at (0: no cap)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, latent_ND: Tensor) -> Tensor:
        """Logits [N, V] of latents, in their dtype or float32, whichever is wider."""
        return self._capped(self._linear(latent_ND))

    def _linear(self, latent_ND: Tensor) -> Tensor:
        wide = torch.promote_types(latent_ND.dtype, torch.float32)
        tiles = self._tiles(wide)
        logits_NV = torch.cat([latent_ND.to(wide) @ tile_VD.T for tile_VD in tiles], -1)
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V.to(wide)
        return logits_NV * self.scale

    def _tiles(self, wide: torch.dtype) -> Iterator[Tensor]:
        """The weight in another dtype, in parts: a wide copy of the whole may not fit."""
        if self.weight_VD.dtype == wide:
            yield self.weight_VD
            return
        rows = max(1, CHUNK_BYTES // (4 * self.weight_VD.shape[1]))
        for part_VD in self.weight_VD.split(rows):
            yield part_VD.to(wide)

    def _pulled(self, slope_NV: Tensor) -> Tensor:
        """slope @ W, [N, D]."""
        total_ND, start = slope_NV.new_zeros(len(slope_NV), self.weight_VD.shape[1]), 0
        for tile_VD in self._tiles(slope_NV.dtype):
            stop = start + len(tile_VD)
            total_ND += slope_NV[:, start:stop] @ tile_VD
            start = stop
        return total_ND

    def _capped(self, linear_NV: Tensor) -> Tensor:
        return self.softcap * torch.tanh(linear_NV / self.softcap) if self.softcap else linear_NV


@dataclass(frozen=True, slots=True)
class Ascent:
    """How latents climb. `optimizer` is adam or sgd; `grad_clip` bounds the norm of the whole
    gradient (0: no bound); `dtype` is that of latents, gradients and moments. `proposal` is
    gradient, or the control random_signs (`wander`); `tokens` says what is made of latents
    that have moved: the likeliest token (argmax), or one drawn (categorical)."""

    lr: float = 0.03
    optimizer: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = 0.0
    dtype: str = "float32"
    proposal: str = "gradient"
    tokens: str = "argmax"


@dataclass(frozen=True, slots=True, eq=False)
class LatentState:
    """Latents [N, D], Adam's moments of the same shape, and the number of steps taken."""

    latent_ND: Tensor
    first_ND: Tensor
    second_ND: Tensor
    num_steps: int = 0

    @classmethod
    def start(cls, latent_ND: Tensor, how: Ascent) -> LatentState:
        """Before the first step."""
        latent_ND = latent_ND.to(getattr(torch, how.dtype))
        zeros_ND = torch.zeros_like(latent_ND)
        return cls(latent_ND, zeros_ND, zeros_ND)

    def to(self, device: torch.device | str) -> LatentState:
        """The same on another device."""
        latent_ND, first_ND = self.latent_ND.to(device), self.first_ND.to(device)
        return LatentState(latent_ND, first_ND, self.second_ND.to(device), self.num_steps)


def gradient(latent_ND: Tensor, tokens_N: Tensor, reward: float, head: Head) -> Tensor:
    """reward * d sum_t log pi(tokens_t | z_t) / dz, [N, D], in the dtype of the latents. A
    reward of 0 gives zeros, whatever else is not finite."""
    if reward == 0:
        return torch.zeros_like(latent_ND)
    rows = rows_at_once(head)
    parts = zip(latent_ND.split(rows), tokens_N.split(rows), strict=True)
    return torch.cat([_gradient(*part, reward, head) for part in parts])


def _gradient(latent_ND: Tensor, tokens_N: Tensor, reward: float, head: Head) -> Tensor:
    linear_NV = head._linear(latent_ND)
    slope_NV = -head._capped(linear_NV).softmax(-1)
    slope_NV.scatter_add_(1, tokens_N[:, None], torch.ones_like(slope_NV[:, :1]))
    if head.softcap:
        slope_NV *= 1 - torch.tanh(linear_NV / head.softcap) ** 2
    return ((reward * head.scale) * head._pulled(slope_NV)).to(latent_ND.dtype)


def likeliest(latent_ND: Tensor, head: Head) -> Tensor:
    """The likeliest token of each latent, int64 [N]; of equals the one with the lowest id."""
    parts = latent_ND.split(rows_at_once(head))
    return torch.cat([head.logits(part).argmax(-1) for part in parts])


def rows_at_once(head: Head) -> int:
    """Positions whose logits may exist at once."""
    return max(1, CHUNK_BYTES // (4 * len(head.weight_VD)))


def ascend(state: LatentState, grad_ND: Tensor, how: Ascent) -> LatentState:
    """One step up the gradient: plain, or as Adam takes it."""
    if how.grad_clip > 0:
        grad_ND = grad_ND * min(1.0, how.grad_clip / (float(grad_ND.norm()) + 1e-6))
    step = state.num_steps + 1
    if how.optimizer == "sgd":
        moved_ND = state.latent_ND + how.lr * grad_ND
        return LatentState(moved_ND, state.first_ND, state.second_ND, step)
    (decay, decay_square), moments = how.betas, (state.first_ND, state.second_ND)
    first_ND = decay * moments[0] + (1 - decay) * grad_ND
    second_ND = decay_square * moments[1] + (1 - decay_square) * grad_ND * grad_ND
    scale_ND = (second_ND / (1 - decay_square**step)).sqrt() + how.eps
    moved_ND = state.latent_ND + how.lr * (first_ND / (1 - decay**step)) / scale_ND
    return LatentState(moved_ND, first_ND, second_ND, step)


def wander(state: LatentState, seed: int, how: Ascent) -> LatentState:
    """One step of lr, up or down, in every coordinate, by signs that `seed` alone decides: as far
    as Adam's first step goes, without its direction."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sign_ND = 2 * torch.randint(2, state.latent_ND.shape, generator=generator, device="cpu") - 1
    moved_ND = state.latent_ND + how.lr * sign_ND.to(state.latent_ND)
    return LatentState(moved_ND, state.first_ND, state.second_ND, state.num_steps + 1)
