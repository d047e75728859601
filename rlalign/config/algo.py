# ruff: noqa: RUF009  (option() and section() return dataclass fields)
"""What is learned. `None` means "whatever the chosen `loss_type` says"."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.allocation import AllocationConfig
from rlalign.config.copg import CopgConfig
from rlalign.config.fields import option, section
from rlalign.config.likelihood import LikelihoodConfig
from rlalign.config.tree import TreeConfig


@dataclass
class OverlongConfig:
    """Completions that reach the limit: soft punishment, or no gradient (DAPO)."""

    buffer_len: int = option(
        0, "It starts this many tokens before the limit; 0 switches it off.", ge=0
    )
    penalty_factor: float = option(1.0, "Largest punishment.", ge=0)
    mask_truncated_completions: bool = option(
        False, "Truncated completions keep their reward, lose their gradient."
    )


@dataclass
class FilterGroupsConfig:
    """Dynamic sampling: roll out again until enough groups carry signal (DAPO)."""

    enable: bool = option(False, "Keep only groups whose `metric` is not constant.")
    metric: str = option("acc", "What must vary within a group.", choices=("acc", "reward"))
    max_num_gen_batches: int = option(
        10, "Rollout batches per step before the step goes on with what it has, or stops.", ge=1
    )
    on_exhausted: str = option(
        "error",
        "At the limit: stop with the reason, or train on the groups found.",
        choices=("error", "train"),
    )


@dataclass
class MismatchConfig:
    """Correction for the gap between the engine's and the trainer's log-probs."""

    rollout_is: str | None = option(
        "auto",
        "Importance weight level; auto: token for a separate engine, none for a shared one.",
        choices=("auto", "none", "token", "sequence", "sequence_geomean", "seq_mask_tis"),
    )
    rollout_is_mode: str = option(
        "truncate",
        "Clamp the weights, or zero those outside the range.",
        choices=("truncate", "mask"),
    )
    rollout_is_max: float = option(2.0, "Upper bound of the weight.", gt=0)
    rollout_is_min: float = option(0.0, "Lower bound of the weight.", ge=0)
    rollout_is_batch_normalize: bool = option(False, "Divide the weights by their batch mean.")
    bypass_mode: bool = option(
        False, "Use the engine's log-probs as logp_old; no extra weight then."
    )


@dataclass
class AlgoConfig:
    """What is learned. Unset fields come from the `loss_type`."""

    loss_type: str = option(
        "grpo", "The algorithm; `rlalign algos` lists them with what each expands to."
    )
    adv_estimator: str | None = option(
        None,
        "How rewards become advantages.",
        choices=(
            "grpo",
            "rloo",
            "reinforce_plus_plus",
            "reinforce_plus_plus_baseline",
            "raft",
            "reinforce_rej",
            "tree",
        ),
    )
    scale_rewards: str | None = option(
        None, "Standard deviation that divides the advantage.", choices=("group", "batch", "none")
    )
    adv_eps: float = option(1e-6, "Added to that standard deviation.", ge=0)
    reward_tie_tol: float = option(
        1e-8, "Relative spread below which rewards count as equal.", ge=0
    )
    singleton_advantage: str = option(
        "zero", "Advantage of a group of one: 0, or its raw reward.", choices=("zero", "raw")
    )
    normalize_advantages: bool = option(False, "Whiten the per-sequence advantages over the batch.")
    importance_sampling_level: str | None = option(
        None,
        "Level of the policy ratio.",
        choices=("token", "sequence", "sequence_token", "sequence_sum"),
    )
    policy_loss: str | None = option(
        None,
        "Surrogate that takes ratio and advantage.",
        choices=("ppo_clip", "cispo", "reinforce", "unclipped"),
    )
    epsilon: float | None = option(
        None, "Lower clip: ratios below 1-epsilon. Under cispo, unset means no lower bound.", ge=0
    )
    epsilon_high: float | None = option(
        None, "Upper clip, relative: ratios above 1+epsilon_high; unset: equal to epsilon.", ge=0
    )
    delta: float | None = option(
        None, "Dual clip: bound of the ratio where the advantage is negative.", gt=1
    )
    loss_agg_mode: str | None = option(
        None,
        "How token losses become one number.",
        choices=(
            "token-mean",
            "seq-mean-token-mean",
            "seq-mean-token-sum",
            "seq-mean-token-sum-norm",
            "token-mean-local",
        ),
    )
    loss_scale_factor: float | None = option(
        None, "Divisor of seq-mean-token-sum-norm; unset: max_completion_length.", gt=0
    )
    prompt_weighting: str | None = option(
        None,
        "Every sample counts the same, or every prompt; inverse_propensity: a sample counts 1/(n p)"
        " with the allocator's n and p.",
        choices=("sample", "prompt", "inverse_propensity"),
    )
    beta: float | None = option(None, "KL coefficient; 0 loads no reference model.", ge=0)
    kl_estimator: str | None = option(
        None,
        "Estimator of the KL to the reference.",
        choices=("k1", "k2", "k3", "k3+", "kl", "mse", "low_var_kl"),
    )
    kl_in: str | None = option(None, "Where the KL goes.", choices=("loss", "reward"))
    use_bias_correction_kl: bool = option(
        False, "Multiply the KL by the policy ratio: exact off-policy."
    )
    num_generations: int = option(8, "Samples per prompt (group size).", ge=1)
    num_iterations: int = option(1, "Passes over one rollout batch.", ge=1)
    num_minibatches: int = option(1, "Optimizer steps per pass.", ge=1)
    entropy_coef: float = option(0.0, "Entropy bonus.", ge=0)
    overlong: OverlongConfig = section(OverlongConfig, "Completions that reach the limit.")
    filter_groups: FilterGroupsConfig = section(FilterGroupsConfig, "Dynamic sampling.")
    copg: CopgConfig = section(CopgConfig, "Contrastive policy gradient.")
    allocation: AllocationConfig = section(AllocationConfig, "Which samples, and how many.")
    likelihood: LikelihoodConfig = section(
        LikelihoodConfig, "Log-probs of a diffusion language model."
    )
    mismatch: MismatchConfig = section(MismatchConfig, "Engine/trainer correction.")
    tree: TreeConfig = section(TreeConfig, "Credit in a tree (BranchGRPO, TreeRL, ...).")
