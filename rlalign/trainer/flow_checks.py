"""Settings of a flow run that are each valid and do not go together."""

from __future__ import annotations

import math

import torch

from rlalign.algos.tree_pruning import pruned_depths
from rlalign.config import Config, ConfigError
from rlalign.rollout.flow import make_plan
from rlalign.rollout.flow_noise import sibling_noise

FLAT = ("dance_grpo", "flow_grpo", "mix_grpo")  # presets of methods without branches


def check_flow(config: Config) -> None:
    """Raise ConfigError (AlgoError or FlowError for the schedule and the sampler themselves)."""
    algo = config.algo
    if algo.adv_estimator != "tree":
        raise ConfigError(
            f"rollout.engine=flow gives credit to the steps of a sampler, and algo.loss_type="
            f"{algo.loss_type} to the tokens of a completion: use loss_type=branch_grpo, "
            "dance_grpo, flow_grpo or mix_grpo"
        )
    if algo.beta and algo.kl_in != "loss":
        raise ConfigError(
            f"algo.kl_in={algo.kl_in} with rollout.engine=flow: the KL of a step is known in closed"
            " form and belongs into the loss; use kl_in=loss"
        )
    if algo.entropy_coef:
        raise ConfigError(
            f"algo.entropy_coef={algo.entropy_coef:g} with rollout.engine=flow: the entropy of a "
            "step is that of its noise, which does not learn; leave it out"
        )
    _check_idle(config)
    _check_noise(config)
    for step in (0, config.trainer.max_steps - 1):
        _check_steps(config, step)
    _check_compared(config)


def _check_idle(config: Config) -> None:
    algo = config.algo
    idle = {
        "algo.filter_groups.enable": algo.filter_groups.enable,
        "algo.overlong.mask_truncated_completions": algo.overlong.mask_truncated_completions,
        "algo.mismatch.bypass_mode": algo.mismatch.bypass_mode,
        "algo.mismatch.rollout_is": algo.mismatch.rollout_is not in (None, "none", "auto"),
        "algo.overlong.buffer_len": algo.overlong.buffer_len,
        "algo.tree.prob_mask": algo.tree.prob_mask,
        "rollout.max_lag": config.rollout.max_lag,
        "rollout.tree.num_trees": config.rollout.tree.num_trees,
        "task.completions": config.task.completions != "rollout",
    }
    if named := [name for name, value in idle.items() if value]:
        raise ConfigError(
            f"{', '.join(named)}: made for completions of language models, without effect with "
            "rollout.engine=flow; leave it out"
        )


def _check_noise(config: Config) -> None:
    """FlowError for siblings that could not be told apart, or scaled by nothing."""
    flow, nothing = config.rollout.flow, torch.zeros(1)
    corr = math.inf if flow.branch_corr is None else flow.branch_corr
    sibling_noise(nothing, nothing, corr, flow.branch_noise or "correlated")
    last = flow.num_steps - 1
    if flow.terminal == "sample" and flow.drop_last_edge and last in flow.split_steps:
        raise ConfigError(
            f"rollout.flow.split_steps={flow.split_steps} splits at the last step, which "
            "drop_last_edge=true leaves out of training: use drop_last_edge=false"
        )


def _check_steps(config: Config, step: int) -> None:
    """Raise ConfigError where nothing could train in `step`, or a window would prune nothing."""
    algo, flow = config.algo, config.rollout.flow
    plan = make_plan(flow, step)
    steps = range(flow.num_steps - bool(flow.drop_last_edge))
    depths = {i + 1 for i in steps if i not in plan.ode_steps}
    if not depths:
        raise ConfigError(
            f"rollout.flow: no step trains in training step {step + 1}: of num_steps="
            f"{flow.num_steps} all are deterministic or left out (drop_last_edge)"
        )
    pruned = set(pruned_depths(algo, step))
    if algo.tree.depth_prune.size and not depths - pruned:
        raise ConfigError(
            f"algo.tree.depth_prune leaves no depth to train in training step {step + 1}: it covers"
            f" {sorted(depths)}; make it smaller"
        )
    if step == 0 and pruned and not pruned & set(range(1, flow.num_steps + 1)):
        raise ConfigError(
            f"algo.tree.depth_prune begins at depth {min(pruned)}, beyond the last of "
            f"{flow.num_steps}, and prunes nothing: set depth_prune.start"
        )


def _check_compared(config: Config) -> None:
    algo, flow = config.algo, config.rollout.flow
    leaves = make_plan(flow, 0).shape.num_leaves
    pooled = algo.tree.scope == "prompt" or algo.tree.advantage == "leaves"
    if leaves * (flow.roots_per_prompt if pooled else 1) == 1:
        raise ConfigError(
            f"one leaf a tree (rollout.flow.split_steps={flow.split_steps}) and algo.tree.scope="
            f"{algo.tree.scope}: nothing is compared, so every advantage is 0. Split, or use "
            "rollout.flow.roots_per_prompt >= 2 with algo.tree.scope=prompt"
        )
    if leaves == 1 and algo.tree.width_prune == "parent_top1":
        raise ConfigError(
            "algo.tree.width_prune=parent_top1 compares siblings, and these trees have none: use "
            "extreme_b, or split"
        )
    if algo.loss_type in FLAT and leaves > 1:
        raise ConfigError(
            f"algo.loss_type={algo.loss_type} is a flat method and rollout.flow.split_steps="
            f"{flow.split_steps} makes trees: set split_steps=[] and roots_per_prompt (see "
            f"configs/{algo.loss_type}/mini.yaml), or use loss_type=branch_grpo"
        )
    if algo.loss_type == "mix_grpo" and not flow.mix.window_size:
        raise ConfigError(
            "algo.loss_type=mix_grpo without a window: set rollout.flow.mix.window_size, e.g. 4"
        )
