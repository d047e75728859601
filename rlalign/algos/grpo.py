"""GRPO: group-relative advantages under the clipped surrogate, each sequence counting the same.

    A_i = (R_i - mean_g R) / (std_g R + adv_eps)
    loss = 1/|S| sum_i 1/|y_i| sum_t [ -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta k3 ]

Shao et al. 2024, arXiv 2402.03300. The KL coefficient is that of DeepSeek-R1.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="grpo",
    summary="Group-normalised rewards, clipped ratio, mean per sequence, KL in the loss.",
    source="Shao et al. 2024, arXiv 2402.03300",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "epsilon_high": None,
        "loss_agg_mode": "seq-mean-token-mean",
        "beta": 0.001,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={
        "num_generations": 16,
    },
)
