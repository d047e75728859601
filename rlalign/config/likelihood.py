"""How a diffusion language model's log-probs are estimated (rlalign/algos/elbo.py)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option

ESTIMATORS = (
    "bernoulli",
    "count",
    "count_strat",
    "count_anti",
    "coupled",
    "all_masked",
    "complement",
    "block_noise",
    "trace",
)


@dataclass
class LikelihoodConfig:
    """What stands for the log-prob of a completion where the policy has none: masked diffusion.
    Unset fields come from the `loss_type`."""

    estimator: str | None = option(
        None, "Which tokens are masked, and how their log-probs are weighed.", choices=ESTIMATORS
    )
    num_mc_samples: int | None = option(
        None,
        "Forward passes of a completion (n_t); complement takes one more, all_masked 1 and trace "
        "one for each step of the sampler, whatever this says.",
        ge=1,
    )
    min_time: float = option(1e-3, "bernoulli: smallest share of masked tokens.", ge=0, le=1)
    prompt_mask_prob: float | None = option(
        None,
        "Each prompt token is masked with it; block_noise: and each token before the block.",
        ge=0,
        le=1,
    )
    shrink: int = option(1, "trace: steps of a block that count as one.", ge=1)
    fresh_masks: bool | None = option(
        None, "Every pass over a batch (num_iterations) masks anew; its old log-probs, too."
    )
    kl_to: str | None = option(
        None,
        "What algo.beta keeps the policy close to: the model the run began with, or the policy "
        "that sampled.",
        choices=("reference", "old"),
    )
    surrogate: str = option(
        "bound",
        "bgpo: the bound, which a forward pass at a time serves; exact: the objective itself, for "
        "one more pass off-policy; quadratic: a looser bound where the advantage is negative.",
        choices=("bound", "exact", "quadratic"),
    )
    norm: str | None = option(
        None,
        "bgpo, espo: what divides the estimate in the ratio: nothing, the tokens that are scored, "
        "or rollout.max_completion_length; unset: valid where ratios are clipped.",
        choices=("none", "valid", "canvas"),
    )
    eubo_power: float = option(
        1.5, "spg: the upper bound's power of a token's probability; 1 and above.", ge=1
    )
    eubo_share: float = option(
        0.5, "spg: share of the upper bound where the advantage is negative.", ge=0, le=1
    )
