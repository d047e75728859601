"""diffu-GRPO (d1): log-probs of a diffusion language model from one forward pass.

    logp_t = log p(y_t | prompt, every token of y masked), the prompt's tokens masked with 0.15
    A_i = R_i - mean_g R
    loss = 1/sum(m) sum_it [ -min(rho A, clip(rho, 1 - 0.5, 1 + 0.5) A) + 0.04 k3_it ]

No token knows another one, so the sum is no log-prob of y; it is cheap. Every iteration over a
batch masks prompts anew, its old and reference log-probs taken under the same masks. The published
runs take 12 iterations over a batch.
Zhao et al. 2025, arXiv 2504.12216.
"""

from rlalign.algos.base import Algorithm

ALGORITHM = Algorithm(
    name="diffu_grpo",
    summary="Diffusion language models: all tokens from one pass, prompts masked a little.",
    source="Zhao et al. 2025, arXiv 2504.12216",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "policy_loss": "ppo_clip",
        "epsilon": 0.5,
        "loss_agg_mode": "token-mean",
        "beta": 0.04,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    paper_settings={
        "num_generations": 6,
        "num_iterations": 12,
        "model.lora.rank": 128,
        "trainer.optim.learning_rate": 3e-6,
        "trainer.optim.max_grad_norm": 0.2,
        "rollout.diffusion.eos_policy": "masked",
        "rollout.temperature": 0.9,
    },
    likelihood={
        "estimator": "all_masked",
        "num_mc_samples": 1,
        "prompt_mask_prob": 0.15,
        "fresh_masks": True,
    },
)
