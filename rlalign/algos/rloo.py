"""RLOO: the baseline of a sample is the mean reward of the others.

    A_i = R_i - 1/(n-1) sum_{j != i} R_j,   R_i reduced by beta sum_t k1_it
    loss = 1/|S| sum_i sum_t -min(rho A, clip(rho, 1 - eps, 1 + eps) A)

On-policy its gradient is the paper's -1/|S| sum_i A_i grad log pi(y_i). TRL's trainer clips the
ratio of whole sequences instead, unnormalised by length: importance_sampling_level=sequence_sum
with loss_agg_mode=seq-mean-token-mean.
Ahmadian et al. 2024, arXiv 2402.14740.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="rloo",
    summary="Leave-one-out baseline, sum over tokens, KL in the reward.",
    source="Ahmadian et al. 2024, arXiv 2402.14740",
    defaults={
        "adv_estimator": "rloo",
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "epsilon_high": None,
        "loss_agg_mode": "seq-mean-token-sum",
        "beta": 0.03,
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
    paper_settings={
        "num_generations": 4,
    },
)
