"""Settings of a flow run that are each valid and do not go together."""

from __future__ import annotations

from rlalign.config import Config, ConfigError
from rlalign.rollout.flow import make_plan

COMPARES = ("depth", "sibling", "leaves")


def check_flow(config: Config) -> None:
    """Raise ConfigError (AlgoError or FlowError for the schedule and the sampler themselves)."""
    algo, flow = config.algo, config.rollout.flow
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
    idle = {
        "algo.filter_groups.enable": algo.filter_groups.enable,
        "algo.mask_truncated_completions": algo.mask_truncated_completions,
        "algo.overlong.buffer_len": algo.overlong.buffer_len,
        "rollout.max_lag": config.rollout.max_lag,
        "rollout.tree.num_trees": config.rollout.tree.num_trees,
        "task.completions": config.task.completions != "rollout",
    }
    if named := [name for name, value in idle.items() if value]:
        raise ConfigError(
            f"{', '.join(named)}: made for completions of language models, without effect with "
            "rollout.engine=flow; leave it out"
        )
    plan = make_plan(flow, 0)
    leaves = plan.shape.num_leaves
    compared = leaves * (flow.roots_per_prompt if algo.tree.scope == "prompt" else 1)
    if compared == 1 and algo.tree.advantage in COMPARES:
        raise ConfigError(
            f"one leaf a tree (rollout.flow.split_steps={flow.split_steps}) and algo.tree.scope="
            f"{algo.tree.scope}: nothing is compared, so every advantage is 0. Split, or use "
            "rollout.flow.roots_per_prompt >= 2 with algo.tree.scope=prompt"
        )
