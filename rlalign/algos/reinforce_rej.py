"""Reinforce-Rej: plain policy gradient on the prompts that are neither always right nor always
wrong.

    A_i = R_i   if the group holds an accepted and a rejected sample, else 0
    loss = 1/sum(m) sum_it m_it -min(rho A, clip(rho, 1 - 0.2, 1 + 0.2) A)

No mean is subtracted and nothing is divided: meant for rewards of +1 and -1.
Xiong et al. 2025, arXiv 2504.11343.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="reinforce_rej",
    summary="Raw rewards on the groups of mixed outcome.",
    source="Xiong et al. 2025, arXiv 2504.11343",
    defaults={
        "adv_estimator": "reinforce_rej",
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "epsilon_high": None,
        "loss_agg_mode": "token-mean",
        "beta": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={"num_generations": 4, "beta": 0.001},
)
