"""Which samples train, and how many each prompt gets (docs/allocation.md)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option


@dataclass
class AllocationConfig:
    """What is accepted, and how many samples each prompt gets (RAFT, GVM, CurES). An allocator
    takes prompts in shards of `update_interval` steps; each begins with a pilot, from which accept
    rates and gradient norms are estimated."""

    compat: str = option(
        "paper",
        "Where a paper and its published code differ: the paper, or the code.",
        choices=("paper", "official"),
    )
    acceptance_threshold: float = option(0.5, "Accepted: a correctness above this.")
    accept: str = option(
        "threshold",
        "Correctness above the threshold, or the `top_k` largest rewards of a prompt.",
        choices=("threshold", "top_k"),
    )
    top_k: int = option(1, "Samples of a prompt that are accepted under accept=top_k.", ge=1)
    normalize_over: str | None = option(
        None,
        "RAFT: what the policy loss is averaged over; unset: accepted, under compat=official all.",
        choices=("accepted", "all"),
    )
    allocator: str | None = option(
        None,
        "How many samples a prompt gets; unset: what the `loss_type` says.",
        choices=("uniform", "gvm", "cures"),
    )
    num_pilot_samples: int = option(8, "Pilot samples a prompt, N'.", ge=1)
    budget_per_prompt: float = option(
        8.0, "Samples a prompt on average, the pilot's apart, N/m.", gt=0
    )
    update_interval: int = option(10, "Steps between pilots.", ge=1)
    train_on_pilot: bool = option(
        True, "The pilot's samples train in the first step after it, as groups of their own."
    )
    pilot_weight: float = option(
        1.0, "How much a pilot sample counts beside one of its prompt's own.", ge=0
    )
    rate_prior: float = option(
        0.0,
        "GVM: pseudo-samples, with the shard's mean accept rate and norm, that each prompt's "
        "estimates begin with. Above 0 no prompt is given up for an unlucky pilot.",
        ge=0,
    )
    min_samples: int = option(0, "Fewest samples of a prompt.", ge=0)
    max_samples: int | None = option(None, "Most samples of a prompt.", ge=1)
    rounding: str = option(
        "largest_remainder",
        "How shares become whole numbers.",
        choices=("largest_remainder", "low_accept_first", "optimal"),
    )
    group_size: int | None = option(
        None,
        "Samples are given out in units of this many; unset: 2 where the advantage compares samples"
        " of a prompt, else 1.",
        ge=1,
    )
    on_empty: str = option(
        "uniform",
        "Where nothing can be weighed (no pilot sample was right): the same for all, or none.",
        choices=("uniform", "skip"),
    )
    grad_params: str | None = option(
        None,
        "Tensor whose gradient norm is measured, or none: all prompts alike. Unset: lm_head, under "
        "compat=official embed_tokens.",
        choices=("lm_head", "embed_tokens", "none"),
    )
    grad_reduction: str = option(
        "sum",
        "The score of a sample is the sum or the mean over its tokens.",
        choices=("sum", "mean"),
    )
    grad_stat: str = option(
        "mean",
        "Of the norms of accepted samples; exact: with the norm of their mean gradient, too.",
        choices=("mean", "rms", "exact"),
    )
    alpha: float = option(1e-3, "GVM: damping of prompts that are hardly ever right.", ge=0)
    beta: float = option(2.0, "GVM: exponent of that damping.", ge=1)
    filter_threshold: float | None = option(
        None, "GVM: prompts with a higher accept rate get nothing.", ge=0, le=1
    )
    filter_insufficient: float = option(
        0.0, "GVM: prompts expected to give fewer accepted samples than this get nothing.", ge=0
    )
    tau: float = option(0.1, "CurES: temperature of the choice of prompts.", gt=0)
    importance: bool = option(
        False, "CurES: weigh prompts by 1/(m rho), so that the data set's mean is trained."
    )
