"""Credit: which advantage goes to which token.

Per group g with mean mu and standard deviation sd (ddof=1) over its n scorable samples:

    grpo                          (R - mu) / (sd + adv_eps); sd of the group, of the batch, or none
                                  (Shao et al. 2024, arXiv 2402.03300; Liu et al. 2025,
                                  arXiv 2503.20783 for none)
    rloo                          R - mean of the others = n/(n-1) (R - mu)
                                  (Ahmadian et al. 2024, arXiv 2402.14740)
    reinforce_plus_plus           return-to-go of 1[t last] R - beta k1_t, whitened over the valid
                                  tokens of the global batch (Hu 2025, arXiv 2501.03262)
    reinforce_plus_plus_baseline  R - mu, then the same whitening
    raft                          1 if the sample is accepted (`allocation.accept`), else 0
                                  (Dong et al. 2023, arXiv 2304.06767)
    reinforce_rej                 R where the group holds both an accepted and a rejected sample,
                                  else 0 (Xiong et al. 2025, arXiv 2504.11343)

A reward that is NaN or infinite is unscorable: it enters no statistic and its own advantage is 0.
Equal rewards give exactly 0. Statistics are taken in float64; the result has the rewards' dtype
(at least float32) and no gradient.

Legend: B samples, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.acceptance import accepted
from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import GroupStats, group_stats, is_tied

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

WHITEN_EPS = 1e-8  # inside the square root, as in verl and OpenRLHF


@dataclass(frozen=True, slots=True)
class Rewards:
    """What an estimator sees: float64, zero where not valid or not inside the mask."""

    reward_B: Tensor
    acc_B: Tensor  # as given
    valid_B: Tensor  # bool
    group_id_B: Tensor
    inside_BT: Tensor  # bool
    penalty_BT: Tensor  # beta * KL per token when the KL goes to the reward, else 0

    def sequence_level(self) -> Tensor:
        """Reward minus the summed KL penalty: [B]."""
        return self.reward_B - self.penalty_BT.sum(1)


def compute_advantages(
    reward_B: Tensor,
    acc_B: Tensor,
    group_id_B: Tensor,
    mask_BT: Tensor,
    cfg: AlgoConfig,
    *,
    kl_BT: Tensor | None = None,
) -> Tensor:
    """Advantage of every token, [B, T], 0 outside the mask.

    reward_B: after shaping, NaN or inf where unscorable. acc_B: unshaped correctness, for
    estimators that accept or reject; unused by those above. mask_BT: 1 where a token may carry
    gradient. kl_BT: per-token KL estimate, required when `kl_in=reward` and `beta > 0`; it is
    multiplied by beta here. Give the whole optimizer batch, because whitening and batch scaling
    are global. Raises AlgoError for an unresolved config or a missing `kl_BT`.
    """
    estimator = ESTIMATORS.get(cfg.adv_estimator or "")
    if estimator is None:
        raise AlgoError(
            f"algo.adv_estimator={cfg.adv_estimator!r} is none of {', '.join(ESTIMATORS)}; "
            "pass the config through rlalign.algos.resolve first"
        )
    rewards = _prepare(reward_B, acc_B, group_id_B, mask_BT, cfg, kl_BT)
    advantage_BT = estimator(rewards, cfg)
    keep_BT = rewards.inside_BT & rewards.valid_B[:, None]
    dtype = torch.promote_types(reward_B.dtype, torch.float32)
    return torch.where(keep_BT, advantage_BT, torch.zeros_like(advantage_BT)).to(dtype)


def whiten(value: Tensor, valid: Tensor, tie_tol: float) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the valid entries, var with ddof=1; 0 elsewhere.

    Fewer than two valid entries, or no spread among them, give zeros: there is nothing to compare.
    """
    chosen = value[valid]
    if chosen.numel() < 2 or bool(is_tied(chosen.min(), chosen.max(), tie_tol)):
        return torch.zeros_like(value)
    scaled = (value - chosen.mean()) / torch.sqrt(chosen.var(correction=1) + WHITEN_EPS)
    return torch.where(valid, scaled, torch.zeros_like(value))


def _prepare(
    reward_B: Tensor,
    acc_B: Tensor,
    group_id_B: Tensor,
    mask_BT: Tensor,
    cfg: AlgoConfig,
    kl_BT: Tensor | None,
) -> Rewards:
    inside_BT = mask_BT.bool()
    penalty_BT = torch.zeros(mask_BT.shape, dtype=torch.float64, device=reward_B.device)
    if cfg.kl_in == "reward" and cfg.beta:
        if kl_BT is None:
            raise AlgoError(
                f"algo.kl_in=reward with algo.beta={cfg.beta} needs kl_BT; compute it with "
                "rlalign.algos.reward_kl, or set algo.beta=0"
            )
        penalty_BT = torch.where(inside_BT, cfg.beta * kl_BT.detach().double(), penalty_BT)
    valid_B = reward_B.isfinite() & penalty_BT.sum(1).isfinite()
    reward64_B = reward_B.detach().double()
    return Rewards(
        torch.where(valid_B, reward64_B, torch.zeros_like(reward64_B)),
        acc_B.detach(),
        valid_B,
        group_id_B,
        inside_BT,
        torch.where(valid_B[:, None], penalty_BT, torch.zeros_like(penalty_BT)),
    )


def _grpo(rewards: Rewards, cfg: AlgoConfig) -> Tensor:
    reward_B = rewards.sequence_level()
    stats = group_stats(reward_B, rewards.group_id_B, rewards.valid_B, cfg.reward_tie_tol)
    centred_B = reward_B - stats.mean_B
    if cfg.scale_rewards == "group":
        centred_B = centred_B / (stats.std_B + cfg.adv_eps)
    elif cfg.scale_rewards == "batch":
        batch_id_B = torch.zeros_like(rewards.group_id_B)
        batch = group_stats(reward_B, batch_id_B, rewards.valid_B, cfg.reward_tie_tol)
        centred_B = centred_B / (batch.std_B + cfg.adv_eps)
    return _per_token(_without_ties(centred_B, reward_B, stats, cfg), stats, rewards, cfg)


def _rloo(rewards: Rewards, cfg: AlgoConfig) -> Tensor:
    reward_B = rewards.sequence_level()
    stats = group_stats(reward_B, rewards.group_id_B, rewards.valid_B, cfg.reward_tie_tol)
    factor_B = stats.count_B / (stats.count_B - 1).clamp(min=1)
    advantage_B = _without_ties(factor_B * (reward_B - stats.mean_B), reward_B, stats, cfg)
    return _per_token(advantage_B, stats, rewards, cfg)


def _reinforce_plus_plus(rewards: Rewards, cfg: AlgoConfig) -> Tensor:
    inside_BT = rewards.inside_BT
    after_BT = inside_BT.flip(1).cumsum(1).flip(1)  # valid tokens from t on
    last_BT = inside_BT & (after_BT == 1)
    token_reward_BT = last_BT * rewards.reward_B[:, None] - rewards.penalty_BT
    return_BT = token_reward_BT.flip(1).cumsum(1).flip(1)
    return whiten(return_BT, inside_BT & rewards.valid_B[:, None], cfg.reward_tie_tol)


def _reinforce_plus_plus_baseline(rewards: Rewards, cfg: AlgoConfig) -> Tensor:
    reward_B = rewards.sequence_level()
    stats = group_stats(reward_B, rewards.group_id_B, rewards.valid_B, cfg.reward_tie_tol)
    advantage_B = _without_ties(reward_B - stats.mean_B, reward_B, stats, cfg)
    valid_BT = rewards.inside_BT & rewards.valid_B[:, None]
    return whiten(advantage_B[:, None].expand(valid_BT.shape), valid_BT, cfg.reward_tie_tol)


def _raft(rewards: Rewards, cfg: AlgoConfig) -> Tensor:
    present_B = rewards.valid_B & rewards.inside_BT.any(1)
    taken_B = accepted(rewards.reward_B, rewards.acc_B, rewards.group_id_B, present_B, cfg)
    return taken_B.double()[:, None].expand(rewards.inside_BT.shape)


def _reinforce_rej(rewards: Rewards, cfg: AlgoConfig) -> Tensor:
    present_B = rewards.valid_B & rewards.inside_BT.any(1)
    taken_B = accepted(rewards.reward_B, rewards.acc_B, rewards.group_id_B, present_B, cfg)
    stats = group_stats(taken_B.double(), rewards.group_id_B, present_B, 0.0)
    advantage_B = torch.where(stats.tied_B, 0.0, rewards.sequence_level())
    return advantage_B[:, None].expand(rewards.inside_BT.shape)


def _without_ties(
    advantage_B: Tensor, reward_B: Tensor, stats: GroupStats, cfg: AlgoConfig
) -> Tensor:
    advantage_B = torch.where(stats.tied_B, torch.zeros_like(advantage_B), advantage_B)
    if cfg.singleton_advantage == "raw":
        advantage_B = torch.where(stats.count_B == 1, reward_B, advantage_B)
    return advantage_B


def _per_token(advantage_B: Tensor, stats: GroupStats, rewards: Rewards, cfg: AlgoConfig) -> Tensor:
    if cfg.normalize_advantages:
        whitened_B = whiten(advantage_B, rewards.valid_B, cfg.reward_tie_tol)
        silent_B = stats.tied_B & (advantage_B == 0)
        advantage_B = torch.where(silent_B, torch.zeros_like(whitened_B), whitened_B)
    return advantage_B[:, None].expand(rewards.inside_BT.shape)


ESTIMATORS: Mapping[str, Callable[[Rewards, AlgoConfig], Tensor]] = {
    "grpo": _grpo,
    "rloo": _rloo,
    "reinforce_plus_plus": _reinforce_plus_plus,
    "reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline,
    "raft": _raft,
    "reinforce_rej": _reinforce_rej,
}
