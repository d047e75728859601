"""Estimators of the KL divergence to the reference policy.

With x = logp - logp_ref and r = exp(-x) (Schulman 2020, "Approximating KL divergence"):

    k1 = x            k2 = x^2 / 2            k3 = r - 1 + x  (>= 0, zero iff x = 0)
    k3+ = k3 in value, k2 in gradient (straight-through)

What each is good for, on-policy: in the reward all of k1 and k3 have the KL as expectation, k2 has
not; differentiated as a loss, k1 gives 0, k2 and k3+ the exact gradient of KL(policy, reference),
k3 the gradient of KL(reference, policy). Multiplied by the policy ratio (`use_bias_correction_kl`),
k1 and k3 give the exact value and gradient even off-policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far from float32 overflow, beyond any meaningful ratio


def estimate_kl(logp_BT: Tensor, logp_ref_BT: Tensor, estimator: str) -> Tensor:
    """Per-token KL estimate, same shape as the inputs, with the gradient of `logp_BT`.

    estimator: k1, k2, k3 or k3+. x is clamped to [-20, 20] for k2 and k3, so neither a value nor a
    gradient can overflow. Raises AlgoError for any other name.
    """
    log_ratio_BT = logp_BT - logp_ref_BT.detach()
    if estimator == "k1":
        return log_ratio_BT
    bounded_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k2":
        return bounded_BT**2 / 2
    # expm1 keeps k3 >= 0 to the last digit near x = 0, where r - 1 + x cancels.
    k3_BT = torch.expm1(-bounded_BT) + bounded_BT
    if estimator == "k3":
        return k3_BT
    if estimator == "k3+":
        k2_BT = bounded_BT**2 / 2
        return k2_BT + (k3_BT - k2_BT).detach()
    raise AlgoError(
        f"algo.kl_estimator={estimator!r} is not an estimator; use k1, k2, k3 or k3+ "
        f"(or an alias: {', '.join(ALIASES)})"
    )


def reward_kl(logp_old_BT: Tensor, logp_ref_BT: Tensor, mask_BT: Tensor, cfg: AlgoConfig) -> Tensor:
    """The `kl_BT` that `compute_advantages` takes when `kl_in=reward`: detached, 0 outside the
    mask, not yet multiplied by beta."""
    inside_BT = mask_BT.bool()
    zero_BT = torch.zeros_like(logp_old_BT)
    logp_BT = torch.where(inside_BT, logp_old_BT.detach(), zero_BT)
    ref_BT = torch.where(inside_BT, logp_ref_BT.detach(), zero_BT)
    return estimate_kl(logp_BT, ref_BT, cfg.kl_estimator or "k1")
