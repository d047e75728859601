"""REINFORCE++: no group and no critic; returns are whitened over the tokens of the batch.

    G_it = R_i - beta sum_{t' >= t} k1_it',   A = (G - mean G) / sqrt(var G + 1e-8)
    loss = 1/sum(m) sum_it -min(rho A, clip(rho, 1 - eps, 1 + eps) A)

Works with one sample per prompt.
Hu 2025, arXiv 2501.03262.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="reinforce_plus_plus",
    summary="Whitened returns with per-token KL in the reward; groups not needed.",
    source="Hu 2025, arXiv 2501.03262",
    defaults={
        "adv_estimator": "reinforce_plus_plus",
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "epsilon_high": None,
        "loss_agg_mode": "token-mean",
        "beta": 0.01,
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
    paper_settings={
        "num_generations": 1,
    },
    aliases=("reinforce++",),
)
