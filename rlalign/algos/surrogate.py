"""Surrogates: from ratio and advantage to a loss per token.

    ppo_clip   l = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)
               and with delta, for A < 0: l = min(l, -delta A)            (dual clip)
    cispo      l = -sg[clip(rho, lo, 1 + epsilon_high)] A logp, lo = 1 - epsilon or 0
    reinforce  l = -A logp
    unclipped  l = -rho A

Gradient support of ppo_clip: zero iff (A > 0 and rho > 1 + epsilon_high), (A < 0 and
rho < 1 - epsilon) or (A < 0 and rho > delta); elsewhere -A rho grad logp. That of cispo is never
zero for A != 0; that of unclipped is -A rho grad logp everywhere. At rho = 1 all of them give
-A grad logp.
Sources: Schulman et al. 2017, arXiv 1707.06347, eq. 7; Ye et al. 2020, arXiv 1912.09729 (dual
clip); MiniMax 2025, arXiv 2506.13585 (CISPO).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

Clipped = dict[str, Tensor]  # low, high, dual -> bool [B, T]


def surrogate(
    ratio: Tensor, advantage_BT: Tensor, logp_BT: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, Clipped]:
    """Loss per token [B, T] and where which clip was active.

    ratio: [B, T], or [B, 1] for a per-sequence ratio, which is broadcast (its loss then belongs
    under seq-mean-token-mean weights, where the T copies average back to one). Raises AlgoError
    for an unknown `policy_loss` or an unset clip.
    """
    chosen = SURROGATES.get(cfg.policy_loss or "")
    if chosen is None:
        raise AlgoError(
            f"algo.policy_loss={cfg.policy_loss!r} is none of {', '.join(SURROGATES)}; "
            "pass the config through rlalign.algos.resolve first"
        )
    return chosen(ratio, advantage_BT, logp_BT, cfg)


def _ppo_clip(
    ratio: Tensor, advantage_BT: Tensor, logp_BT: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, Clipped]:
    if cfg.epsilon is None or cfg.epsilon_high is None:
        raise AlgoError(
            "algo.epsilon and algo.epsilon_high are not set for policy_loss=ppo_clip; pass the "
            "config through rlalign.algos.resolve first"
        )
    low, high = 1 - cfg.epsilon, 1 + cfg.epsilon_high
    loss_BT = -torch.minimum(ratio * advantage_BT, ratio.clamp(low, high) * advantage_BT)
    negative_BT = advantage_BT < 0
    clipped = {"low": (ratio < low) & negative_BT, "high": (ratio > high) & (advantage_BT > 0)}
    if cfg.delta is not None:
        loss_BT = torch.where(
            negative_BT, torch.minimum(loss_BT, -cfg.delta * advantage_BT), loss_BT
        )
        clipped["dual"] = (ratio > cfg.delta) & negative_BT
    return loss_BT, clipped


def _cispo(
    ratio: Tensor, advantage_BT: Tensor, logp_BT: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, Clipped]:
    if cfg.epsilon_high is None:
        raise AlgoError("algo.epsilon_high is not set for policy_loss=cispo; resolve the config")
    low = 0.0 if cfg.epsilon is None else 1 - cfg.epsilon
    high = 1 + cfg.epsilon_high
    weight = ratio.detach()
    acts_BT = advantage_BT != 0
    clipped = {"low": (weight < low) & acts_BT, "high": (weight > high) & acts_BT}
    return -weight.clamp(low, high) * advantage_BT * logp_BT, clipped


def _reinforce(
    ratio: Tensor, advantage_BT: Tensor, logp_BT: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, Clipped]:
    return -advantage_BT * logp_BT, {}


def _unclipped(
    ratio: Tensor, advantage_BT: Tensor, logp_BT: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, Clipped]:
    return -ratio * advantage_BT, {}


SURROGATES: Mapping[str, Callable[[Tensor, Tensor, Tensor, AlgoConfig], tuple[Tensor, Clipped]]] = {
    "ppo_clip": _ppo_clip,
    "cispo": _cispo,
    "reinforce": _reinforce,
    "unclipped": _unclipped,
}
