"""GSPO: one ratio per sequence, because the reward is per sequence.

    s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|)
    loss = 1/|S| sum_i -min(s_i A_i, clip(s_i, 1 - 3e-4, 1 + 4e-4) A_i)

A_i as in GRPO. The length-normalised ratio stays close to 1, hence the tiny clip range; it clips
far more tokens than GRPO and is meant for several mini-batches per rollout. With per-token
advantages set importance_sampling_level=sequence_token (GSPO-token, same paper).
Zheng et al. 2025, arXiv 2507.18071.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="gspo",
    summary="Length-normalised sequence ratio with a tiny clip range.",
    source="Zheng et al. 2025, arXiv 2507.18071",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "sequence",
        "policy_loss": "ppo_clip",
        "epsilon": 0.0003,
        "epsilon_high": 0.0004,
        "loss_agg_mode": "seq-mean-token-mean",
        "beta": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={
        "num_minibatches": 4,
    },
)
