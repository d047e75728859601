"""Which combinations of settings make no sense, as a table of rules on a resolved config."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlalign.algos.allocator import needs_mean_gradients
from rlalign.algos.errors import AlgoError, AlgoWarning
from rlalign.algos.ratio import PER_SEQUENCE

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

GROUP_BASELINES = ("grpo", "rloo", "reinforce_plus_plus_baseline")
TREE_SCALES = {  # what divides a tree's advantage, where not everything can
    "parent": ("group", "none"),
    "root_parent": ("none",),
    "ancestors": ("batch", "none"),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """`broken` says whether a config breaks it; `why` is formatted with the config as `c`."""

    broken: Callable[[AlgoConfig], bool]
    why: str


ERRORS: tuple[Rule, ...] = (
    Rule(
        lambda c: _grows_trees(c) and c.importance_sampling_level != "token",
        "algo.importance_sampling_level={c.importance_sampling_level} with adv_estimator=tree: the "
        "edges of a tree are no sequences, their ratios are per token, or step; leave it out",
    ),
    Rule(
        lambda c: (
            _grows_trees(c) and (c.loss_agg_mode, c.prompt_weighting) != ("token-mean", "sample")
        ),
        "algo.loss_agg_mode={c.loss_agg_mode}, prompt_weighting={c.prompt_weighting} have no "
        "effect with adv_estimator=tree, where algo.tree.weight says what an edge counts; leave "
        "them out",
    ),
    Rule(
        lambda c: _grows_trees(c) and (c.normalize_advantages or c.singleton_advantage != "zero"),
        "algo.normalize_advantages={c.normalize_advantages}, singleton_advantage="
        "{c.singleton_advantage} have no effect with adv_estimator=tree; leave them out",
    ),
    Rule(
        lambda c: _grows_trees(c) and c.kl_in == "reward",
        "algo.kl_in=reward with adv_estimator=tree: a tree has rewards at its leaves only, which "
        "share the tokens that a KL would be charged for; use kl_in=loss",
    ),
    Rule(
        lambda c: _grows_trees(c) and c.allocation.allocator != "uniform",
        "algo.allocation.allocator={c.allocation.allocator} with adv_estimator=tree: how many "
        "samples a prompt gets is the shape of its trees; use allocator=uniform",
    ),
    Rule(
        lambda c: (
            _grows_trees(c)
            and c.scale_rewards not in TREE_SCALES.get(str(c.tree.advantage), (c.scale_rewards,))
        ),
        "algo.scale_rewards={c.scale_rewards} is nothing for algo.tree.advantage="
        "{c.tree.advantage}: parent takes group or none, root_parent none, ancestors batch or none",
    ),
    Rule(
        lambda c: (
            _grows_trees(c)
            and c.tree.baseline != "mean"
            and c.tree.advantage not in ("depth", "sibling", "leaves")
        ),
        "algo.tree.baseline={c.tree.baseline} has no effect with algo.tree.advantage="
        "{c.tree.advantage}, which compares with values and not with a mean; leave it out",
    ),
    Rule(
        lambda c: _grows_trees(c) and c.tree.carry_leaves and c.tree.advantage != "depth",
        "algo.tree.carry_leaves=true has no effect with algo.tree.advantage={c.tree.advantage}, "
        "which compares across depths anyway; leave it out, or use advantage=depth",
    ),
    Rule(
        lambda c: (
            c.tree.depth_prune.size > 0
            and c.tree.depth_prune.direction == "later"
            and c.tree.depth_prune.start + c.tree.depth_prune.size - 1 > c.tree.depth_prune.stop
        ),
        "algo.tree.depth_prune: size={c.tree.depth_prune.size} depths from start="
        "{c.tree.depth_prune.start} on reach beyond stop={c.tree.depth_prune.stop}, behind which "
        "a window that slides later never goes; raise stop, or begin earlier",
    ),
    Rule(
        lambda c: (
            c.tree.depth_prune.size > 0
            and c.tree.depth_prune.direction == "earlier"
            and c.tree.depth_prune.start < c.tree.depth_prune.stop
        ),
        "algo.tree.depth_prune: start={c.tree.depth_prune.start} lies before stop="
        "{c.tree.depth_prune.stop}, before which a window that slides earlier never begins; lower "
        "stop, e.g. to the last split",
    ),
)

ERRORS += (
    Rule(
        lambda c: (
            c.importance_sampling_level in PER_SEQUENCE
            and c.policy_loss != "reinforce"
            and c.loss_agg_mode != "seq-mean-token-mean"
        ),
        "algo.importance_sampling_level={c.importance_sampling_level} gives one loss per sequence, "
        "which algo.loss_agg_mode={c.loss_agg_mode} would multiply by its length; use "
        "loss_agg_mode=seq-mean-token-mean, or importance_sampling_level=sequence_token",
    ),
    Rule(
        lambda c: c.scale_rewards != "none" and c.adv_estimator not in ("grpo", "tree"),
        "algo.scale_rewards={c.scale_rewards} has no effect with adv_estimator={c.adv_estimator}; "
        "leave it out, or use adv_estimator=grpo or tree",
    ),
    Rule(
        lambda c: c.normalize_advantages and str(c.adv_estimator).startswith("reinforce_plus_plus"),
        "algo.normalize_advantages=true would whiten twice: adv_estimator={c.adv_estimator} "
        "already whitens over the tokens of the batch; leave it out",
    ),
    Rule(
        lambda c: (
            c.num_generations == 1
            and c.adv_estimator in GROUP_BASELINES
            and c.singleton_advantage == "zero"
        ),
        "algo.num_generations=1 with adv_estimator={c.adv_estimator} makes every advantage 0: a "
        "group of one has no baseline; use num_generations>=2, adv_estimator=reinforce_plus_plus, "
        "or singleton_advantage=raw",
    ),
    Rule(
        lambda c: (
            c.filter_groups.enable and c.num_generations == 1 and c.singleton_advantage == "zero"
        ),
        "algo.filter_groups.enable=true with num_generations=1 drops every group: one sample "
        "cannot vary; use num_generations>=2, or switch the filter off",
    ),
    Rule(
        lambda c: c.delta is not None and c.policy_loss != "ppo_clip",
        "algo.delta={c.delta} has no effect with policy_loss={c.policy_loss}; leave it out",
    ),
    Rule(
        lambda c: (
            c.policy_loss == "reinforce" and (c.epsilon is not None or c.epsilon_high is not None)
        ),
        "algo.epsilon={c.epsilon}, epsilon_high={c.epsilon_high} have no effect with "
        "policy_loss=reinforce, which has no ratio; leave them out",
    ),
    Rule(
        lambda c: c.policy_loss == "ppo_clip" and c.epsilon is not None and c.epsilon >= 1,
        "algo.epsilon={c.epsilon} puts the lower clip at or below 0, where no ratio can be, so "
        "negative advantages would never be clipped; use a value below 1",
    ),
    Rule(
        lambda c: (
            c.delta is not None and c.epsilon_high is not None and c.delta <= 1 + c.epsilon_high
        ),
        "algo.delta={c.delta} must exceed 1 + epsilon_high = 1 + {c.epsilon_high}: the dual clip "
        "bounds the ratio beyond the ordinary one; 3.0 is usual",
    ),
    Rule(
        lambda c: (
            c.loss_scale_factor is not None
            and c.loss_agg_mode != "seq-mean-token-sum-norm"
            and c.copg.length_normalization != "const"
        ),
        "algo.loss_scale_factor={c.loss_scale_factor} has no effect with "
        "loss_agg_mode={c.loss_agg_mode}; leave it out, or use seq-mean-token-sum-norm",
    ),
    Rule(
        lambda c: c.use_bias_correction_kl and c.kl_in == "reward",
        "algo.use_bias_correction_kl=true has no effect with kl_in=reward, where the KL is already "
        "taken under the policy that sampled; leave it out, or use kl_in=loss",
    ),
    Rule(
        lambda c: not c.mismatch.rollout_is_min <= 1 <= c.mismatch.rollout_is_max,
        "algo.mismatch: the range [{c.mismatch.rollout_is_min}, {c.mismatch.rollout_is_max}] "
        "excludes 1, the weight of a perfect engine; use rollout_is_min <= 1 <= rollout_is_max",
    ),
    Rule(
        lambda c: (
            c.mismatch.rollout_is == "sequence_geomean" and c.mismatch.rollout_is_mode == "truncate"
        ),
        "algo.mismatch.rollout_is=sequence_geomean is no importance weight, it can only select "
        "sequences; set algo.mismatch.rollout_is_mode=mask",
    ),
    Rule(
        lambda c: c.mismatch.bypass_mode and c.mismatch.rollout_is != "none",
        "algo.mismatch.bypass_mode=true already puts the engine's log-probs under the ratio, so "
        "rollout_is={c.mismatch.rollout_is} would correct twice; set rollout_is=none",
    ),
)

ERRORS += (
    Rule(
        lambda c: c.prompt_weighting == "inverse_propensity" and c.allocation.allocator != "gvm",
        "algo.prompt_weighting=inverse_propensity needs the n and p of an allocator, and "
        "algo.allocation.allocator={c.allocation.allocator} has none: use gvm, or "
        "prompt_weighting=prompt",
    ),
    Rule(
        lambda c: c.prompt_weighting == "inverse_propensity" and c.allocation.train_on_pilot,
        "algo.prompt_weighting=inverse_propensity with allocation.train_on_pilot=true: the rate of "
        "a prompt is taken from the pilot's samples themselves; use prompt_weighting=prompt, which "
        "needs no rate, or train_on_pilot=false",
    ),
    Rule(
        lambda c: (
            needs_mean_gradients(c)
            and c.allocation.grad_params != "none"
            and (c.allocation.grad_params, c.allocation.grad_reduction) != ("lm_head", "sum")
        ),
        "algo.allocation: grad_params={c.allocation.grad_params} with grad_reduction="
        "{c.allocation.grad_reduction}, but the norm of a mean gradient (CurES; grad_stat=exact) "
        "is there for lm_head and sum only: use these, grad_params=none, or under CurES "
        "compat=official, which takes mean norms in its place",
    ),
    Rule(
        lambda c: c.allocation.allocator != "uniform" and not _has_room(c),
        "algo.allocation: min_samples={c.allocation.min_samples}, max_samples="
        "{c.allocation.max_samples}, in units of group_size={c.allocation.group_size}, with "
        "budget_per_prompt={c.allocation.budget_per_prompt:g}: each prompt needs at least "
        "min_samples, rounded up to whole units, within the budget, and max_samples must hold that "
        "and one unit",
    ),
)

ERRORS += (
    Rule(
        lambda c: c.loss_type == "copg" and not c.beta and c.copg.loss_type == "square",
        "algo.beta={c.beta} with algo.copg.loss_type=square divides by 0: use beta > 0 (the paper "
        "finds 0.03 to 0.1 good), or algo.copg.loss_type=surrogate",
    ),
    Rule(
        lambda c: c.copg.length_normalization == "const" and not c.loss_scale_factor,
        "algo.copg.length_normalization=const divides by algo.loss_scale_factor, which is not set: "
        "give it, e.g. rollout.max_completion_length",
    ),
    Rule(
        lambda c: (
            c.loss_type == "copg"
            and (c.prompt_weighting, c.loss_agg_mode) != ("prompt", "seq-mean-token-sum")
        ),
        "algo.loss_type=copg has one loss per prompt: prompt_weighting={c.prompt_weighting} and "
        "loss_agg_mode={c.loss_agg_mode} do not apply; leave them out",
    ),
)

ERRORS += (
    Rule(
        lambda c: _grows_trees(c) and c.mismatch.rollout_is not in (None, "none", "auto", "token"),
        "algo.mismatch.rollout_is={c.mismatch.rollout_is} with adv_estimator=tree: the edges of a "
        "tree are no sequences, their weights are per token; use token",
    ),
)

WARNINGS: tuple[Rule, ...] = (
    Rule(
        lambda c: c.loss_type == "copg" and (c.entropy_coef > 0 or c.kl_in != "loss"),
        "algo.entropy_coef={c.entropy_coef}, kl_in={c.kl_in} with loss_type=copg: its loss has no "
        "entropy bonus, and the KL is in it; leave them out",
    ),
    Rule(
        lambda c: c.adv_estimator == "raft" and c.kl_in == "reward" and bool(c.beta),
        "algo.beta={c.beta} has no effect with kl_in=reward under adv_estimator=raft, whose "
        "advantages are 0 or 1 whatever the reward: use kl_in=loss",
    ),
    Rule(
        lambda c: c.allocation.importance and c.prompt_weighting == "sample",
        "algo.allocation.importance=true with prompt_weighting=sample: a prompt still counts by "
        "its samples, which are not shared out evenly, so the data set's mean is not what is "
        "trained; use prompt_weighting=prompt",
    ),
    Rule(
        lambda c: c.loss_type == "copg" and not c.beta,
        "algo.beta=0 with loss_type=copg is REINFORCE with a leave-one-out baseline: off-policy "
        "nothing holds it at an optimum; use beta > 0",
    ),
    Rule(
        lambda c: (
            c.allocation.allocator != "uniform"
            and c.adv_estimator in GROUP_BASELINES
            and c.allocation.group_size == 1
            and c.allocation.min_samples < 2
            and c.singleton_advantage == "zero"
        ),
        "algo.allocation.allocator={c.allocation.allocator} may give a prompt one sample, which "
        "adv_estimator={c.adv_estimator} cannot compare with another: it is wasted. Use "
        "allocation.group_size=2 or more",
    ),
    Rule(
        lambda c: (
            bool(c.beta)
            and c.kl_in == "loss"
            and c.kl_estimator == "k1"
            and not c.use_bias_correction_kl
        ),
        "algo.kl_estimator=k1 with kl_in=loss: its expected gradient is 0, so nothing holds the "
        "policy near the reference; use k2 or k3+, or kl_in=reward",
    ),
    Rule(
        lambda c: bool(c.beta) and c.kl_in == "reward" and c.kl_estimator != "k1",
        "algo.kl_estimator={c.kl_estimator} with kl_in=reward: k2 is not the KL, and the gradient "
        "of neither k2 nor k3 is that of the KL there; use k1",
    ),
    Rule(
        lambda c: bool(c.beta) and c.use_bias_correction_kl and c.kl_estimator in ("k2", "k3+"),
        "algo.use_bias_correction_kl=true with kl_estimator={c.kl_estimator}: the gradient of the "
        "latter is exact without it and biased with it; use k3, or leave the correction out",
    ),
)


def _grows_trees(cfg: AlgoConfig) -> bool:
    return cfg.adv_estimator == "tree"


def _has_room(cfg: AlgoConfig) -> bool:
    """Whether an allocator's bounds can be kept at all."""
    section, unit = cfg.allocation, cfg.allocation.group_size or 1
    least = -(-section.min_samples // unit) * unit
    most = section.max_samples
    return least <= section.budget_per_prompt and (most is None or most >= max(least, unit))


def check(cfg: AlgoConfig) -> None:
    """Raise AlgoError for the first broken rule of ERRORS; warn AlgoWarning for each of
    WARNINGS."""
    for rule in ERRORS:
        if rule.broken(cfg):
            raise AlgoError(rule.why.format(c=cfg))
    for rule in WARNINGS:
        if rule.broken(cfg):
            warnings.warn(rule.why.format(c=cfg), AlgoWarning, stacklevel=3)
