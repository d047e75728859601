"""Coupled GRPO (DiffuCoder): log-probs from all masked, and from a mask and its complement.

    t ~ U(0.2, 0.8), each token in S with probability t
    logp_i = 1/2 [ log p(y_i | all masked) + 1[i in S]     log p(y_i | S masked) / t
                                           + 1[i not in S] log p(y_i | S visible) / (1 - t) ]
    A_i = R_i - mean of the others
    loss = 1/sum(m) sum_it [ -min(rho A, clip(rho, 1 - 0.5, 1 + 0.5) A) + 0.01 k3_it ]

Every token is scored twice, once with a part of the others visible.
Gong et al. 2025, arXiv 2506.20639.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="coupled_grpo",
    summary="Diffusion language models: a mask and its complement, leave-one-out baseline.",
    source="Gong et al. 2025, arXiv 2506.20639",
    defaults={
        "adv_estimator": "rloo",
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.5,
        "loss_agg_mode": "token-mean",
        "beta": 0.01,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={
        "num_generations": 10,
        "num_iterations": 2,
        "trainer.optim.learning_rate": 1e-6,
        "rollout.diffusion.order": "entropy",
        "rollout.temperature": 1.0,
    },
    likelihood={"estimator": "complement", "num_mc_samples": 2, "fresh_masks": True},
)
