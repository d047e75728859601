"""RAFT: keep the samples that are right, take maximum-likelihood steps on them, repeat.

    A_i = 1[accepted]
    RAFT     loss = -1/|S| sum_{i in S} 1/n_i sum_t log pi(y_it)
    RAFT++   loss = -1/|S| sum_{i in S} 1/n_i sum_t min(rho_it, 1 + epsilon_high)

with S the accepted samples of the batch. RAFT++ has the ratio of PPO, so that several optimizer
steps can use one rollout batch; since A is never negative its lower clip does nothing. A truncated
sample is rejected. What a prompt of which nothing is accepted contributes is nothing.

The published code takes the mean over the tokens of all samples, rejected ones in the denominator
(allocation.normalize_over=all with loss_agg_mode=token-mean), so its step shrinks with the share
that is accepted. The KL always goes over all samples.
Dong et al. 2023, arXiv 2304.06767; Xiong et al. 2025, arXiv 2504.11343 (RAFT++).
"""

from rlalign.algos.base import Algorithm

SHARED = {
    "adv_estimator": "raft",
    "scale_rewards": "none",
    "importance_sampling_level": "token",
    "loss_agg_mode": "seq-mean-token-mean",
    "beta": 0.0,
    "kl_in": "loss",
    "kl_estimator": "k3",
}
PLUS_PLUS = {"policy_loss": "ppo_clip", "epsilon": 0.2, "epsilon_high": 0.28}

ALGORITHMS = (
    Algorithm(
        name="raft",
        summary="Maximum likelihood on the accepted samples.",
        source="Dong et al. 2023, arXiv 2304.06767",
        defaults={**SHARED, "policy_loss": "reinforce"},
        paper_settings={"num_generations": 4, "beta": 0.001},
    ),
    Algorithm(
        name="raft++",
        summary="RAFT with PPO's ratio and clip-higher, for several steps a batch.",
        source="Xiong et al. 2025, arXiv 2504.11343",
        defaults={**SHARED, **PLUS_PLUS},
        paper_settings={"num_generations": 4, "num_minibatches": 2, "beta": 0.001},
        aliases=("raft_plus_plus",),
    ),
)
