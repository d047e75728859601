"""DAPO: every token counts the same, the upper clip is wider, no KL.

    A_i = (R_i - mean_g R) / (std_g R + adv_eps)
    loss = 1/sum(m) sum_it -min(rho A, clip(rho, 1 - 0.2, 1 + 0.28) A)

The other two pieces of the paper are settings of the run, see `paper_settings`: dynamic sampling
(groups without signal are replaced) and the soft overlong punishment.
Yu et al. 2025, arXiv 2503.14476.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="dapo",
    summary="Token mean, clip-higher, no KL; meant with dynamic sampling.",
    source="Yu et al. 2025, arXiv 2503.14476",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "loss_agg_mode": "token-mean",
        "beta": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={
        "num_generations": 16,
        "filter_groups.enable": True,
        "overlong.buffer_len": 4096,
        "overlong.penalty_factor": 1.0,
        "rollout.max_completion_length": 20480,
    },
)
