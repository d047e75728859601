"""TraceRL: log-probs of the tokens as the sampler chose them.

    logp_i = log p(y_i | prompt, what the sampler had decided before step s_i)
    A_i = (R_i - mean_g R) / (std_g R + adv_eps)
    loss = 1/|S| sum_i 1/L sum_t [ -min(rho A, clip(rho, 1 - 0.2, 1 + 0.2) A) + 0.01 k3(old)_it ]

with s_i the step that decided token i and L the longest completion. With `shrink=1` these are the
log-probs at which the tokens were sampled, at the sampling temperature; larger ones take several
steps of a block as one, for fewer passes. The KL is that to the policy that sampled.
Wang et al. 2025, arXiv 2509.06949.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="tracerl",
    summary="Diffusion language models: tokens under the masks that the sampler saw.",
    source="Wang et al. 2025, arXiv 2509.06949",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "loss_agg_mode": "seq-mean-token-sum-norm",
        "beta": 0.01,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={
        "num_generations": 16,
        "likelihood.shrink": 8,
        "trainer.optim.learning_rate": 1e-6,
    },
    likelihood={"estimator": "trace", "num_mc_samples": 1, "kl_to": "old"},
)
