"""ESPO: one ratio per completion, of estimates of the bound, over the canvas's length.

    rho_i = exp((ell_i - ell_i_old) / L)
    loss = 1/|S| sum_i [ -min(rho_i A_i, clip(rho_i, 1 - 0.2, 1 + 0.2) A_i)
                         + 0.01 (ell_i - ell_i_ref)^2 / (2 L) ]

with ell the estimate over pairs of a mask and its complement and L the length of the canvas. The
exponent is not a sum over passes; its gradient is taken one pass at a time nevertheless, see
`sequence_loss` in elbo.py. A_i as in GRPO.
Ou et al. 2025, arXiv 2512.03759.
"""

from rlalign.algos.base import Algorithm
from rlalign.algos.elbo import sequence_loss

ALGORITHM = Algorithm(
    name="espo",
    summary="Diffusion language models: a ratio of the bound per completion, k2 on it.",
    source="Ou et al. 2025, arXiv 2512.03759",
    defaults={
        "adv_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "sequence",
        "policy_loss": "ppo_clip",
        "epsilon": 0.2,
        "loss_agg_mode": "seq-mean-token-mean",
        "beta": 0.01,
        "kl_in": "loss",
        "kl_estimator": "k2",
    },
    paper_settings={
        "num_generations": 10,
        "num_iterations": 8,
        "model.lora.rank": 128,
        "trainer.optim.learning_rate": 3e-6,
    },
    fixed=("importance_sampling_level", "kl_estimator"),
    likelihood={
        "estimator": "coupled",
        "num_mc_samples": 2,
        "fresh_masks": True,
        "norm": "canvas",
    },
    estimate_loss=sequence_loss,
)
