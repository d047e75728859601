"""Dr. GRPO: GRPO without the two divisions that bias it.

    A_i = R_i - mean_g R
    loss = 1/(|S| L) sum_i sum_t -min(rho A, clip(rho, 1 - eps, 1 + eps) A)

No standard deviation (it favours prompts that are nearly solved or nearly hopeless) and a constant
L = max_completion_length instead of |y_i| (which favours long wrong answers). Divided by the number
of sequences AND by L, as in TRL; verl divides by L alone, so its learning rate differs by |S|.
Liu et al. 2025, arXiv 2503.20783.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="dr_grpo",
    summary="GRPO without std and length division.",
    source="Liu et al. 2025, arXiv 2503.20783",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "epsilon_high": None,
        "loss_agg_mode": "seq-mean-token-sum-norm",
        "beta": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={
        "num_generations": 8,
        "rollout.max_completion_length": 3000,
    },
)
