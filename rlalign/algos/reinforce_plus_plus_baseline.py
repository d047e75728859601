"""REINFORCE++ with the group mean as baseline, whitened over the batch instead of the group.

    A = whiten_tokens(R_i - mean_g R)
    loss = 1/sum(m) sum_it [ -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta k2 ]

The whitening is over tokens: a group without signal gets the small common shift of the batch.
The coefficient 0.01 is OpenRLHF's default.
Hu 2025, arXiv 2501.03262.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="reinforce_plus_plus_baseline",
    summary="Group-mean baseline, global whitening, k2 in the loss.",
    source="Hu 2025, arXiv 2501.03262",
    defaults={
        "adv_estimator": "reinforce_plus_plus_baseline",
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "epsilon_high": None,
        "loss_agg_mode": "token-mean",
        "beta": 0.01,
        "kl_in": "loss",
        "kl_estimator": "k2",
    },
    aliases=("reinforce++_baseline",),
)
