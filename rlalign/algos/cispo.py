"""CISPO: the clipped ratio is a weight without gradient, so no token loses its gradient.

    loss = 1/sum(m) sum_it -sg[min(rho, 1 + epsilon_high)] A logp

`epsilon_high` is relative, as everywhere here: 4.0 caps the ratio at 5.0, ScaleRL's value, which
TRL writes as 5.0. No lower bound unless `epsilon` is set. A_i as in GRPO (ScaleRL scales by the
batch: scale_rewards=batch). A float32 LM head is recommended.
MiniMax 2025, arXiv 2506.13585; the cap from Khatri et al. 2025 (ScaleRL), arXiv 2510.13786.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="cispo",
    summary="REINFORCE weighted by the capped ratio; token mean.",
    source="MiniMax 2025, arXiv 2506.13585",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "policy_loss": "cispo",
        "epsilon": None,
        "epsilon_high": 4.0,
        "loss_agg_mode": "token-mean",
        "beta": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={
        "scale_rewards": "batch",
    },
)
