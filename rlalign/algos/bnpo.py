"""The token mean of each micro-batch, as TRL's loss_type=bnpo: for parity only.

    loss = 1/K sum_k [ 1/sum(m_k) sum_{it in k} -min(rho A, clip(rho, 1 - eps, 1 + eps) A) ]

The gradient depends on how the batch is cut into its K micro-batches: tokens of a micro-batch with
few tokens weigh more. Use dapo for a token mean without that. A_i as in GRPO.
Hugging Face TRL, GRPOConfig.loss_type.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="bnpo",
    summary="TRL's per-micro-batch token mean; depends on the split, for parity only.",
    source="Hugging Face TRL, GRPOConfig.loss_type=bnpo",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "epsilon_high": None,
        "loss_agg_mode": "token-mean-local",
        "beta": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
)
