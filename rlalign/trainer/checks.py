"""Settings that are each valid and do not go together, found before anything is loaded."""

from __future__ import annotations

import importlib.util

import torch

from rlalign.config import Config, ConfigError
from rlalign.rewards.scorer import accuracy_index
from rlalign.tasks import ScoredSet
from rlalign.tasks.scored import check_transform
from rlalign.trainer.diffusion_checks import check_diffusion
from rlalign.trainer.estimate_checks import check_estimates
from rlalign.trainer.flow_checks import check_flow


def check_config(config: Config) -> None:
    """Raise ConfigError for settings that contradict each other on any machine."""
    check_estimates(config)
    if config.rollout.engine == "flow":
        check_flow(config)
        _check_trainer(config)
        return
    if config.rollout.engine == "masked_diffusion":
        check_diffusion(config)
    _check_completions(config)
    _check_sources(config)
    _check_rewards(config)
    _check_trainer(config)
    if config.rollout.max_lag and config.rollout.engine != "server":
        raise ConfigError(
            f"rollout.max_lag = {config.rollout.max_lag} needs an engine in another process, not "
            f"rollout.engine={config.rollout.engine}: start `rlalign serve MODEL` and use "
            "rollout.engine=server, or set rollout.max_lag=0"
        )
    _check_oversample(config)
    _check_allocation(config)
    _check_trees(config)
    if config.rollout.engine in ("vllm", "server"):
        _check_vllm(config)


def check_machine(config: Config) -> None:
    """Raise ConfigError for settings that this machine cannot serve."""
    if config.trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.device = 'cuda', but this machine has no usable GPU. Use trainer.device=auto "
            "(or cpu), or start from configs/grpo/mini.yaml, which is made for a CPU."
        )
    if config.kernels.backend == "triton" and (
        config.trainer.device == "cpu" or not torch.cuda.is_available()
    ):
        raise ConfigError(
            "kernels.backend = 'triton' needs a GPU to train on. Use kernels.backend=auto: Triton "
            "where there is one, chunks in plain torch elsewhere."
        )
    if config.tracking.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"tracking.wandb = {config.tracking.wandb!r} but wandb is not installed: "
            "pip install 'rlalign[wandb]', or tracking.wandb=disabled"
        )


def check_context(model_config, config: Config) -> None:
    """Raise ConfigError when prompt and completion together do not fit the model."""
    wanted = config.task.max_prompt_length + config.rollout.max_completion_length
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"task.max_prompt_length {config.task.max_prompt_length} + "
            f"rollout.max_completion_length {config.rollout.max_completion_length} = {wanted}, but "
            f"the model holds {limit} positions: lower one of the two"
        )


def _check_oversample(config: Config) -> None:
    rollout = config.rollout
    if rollout.oversample == 1:
        return
    if not rollout.max_lag:
        raise ConfigError(
            f"rollout.oversample = {rollout.oversample:g} carries groups over to the next step, "
            "and so they are one version old: set rollout.max_lag=1 or more, or oversample=1"
        )
    if rollout.server.in_flight != "keep":
        raise ConfigError(
            f"rollout.oversample = {rollout.oversample:g} carries groups over an update: set "
            "rollout.server.in_flight=keep, so that they go on under the new weights"
        )


def _check_allocation(config: Config) -> None:
    allocator = config.algo.allocation.allocator
    if allocator in (None, "uniform") or not config.rollout.max_lag:
        return
    raise ConfigError(
        f"algo.allocation.allocator = {allocator} measures gradients before it shares samples out, "
        f"and the trainer that does is busy with rollout.max_lag = {config.rollout.max_lag}: use "
        "rollout.max_lag=0, or allocator=uniform"
    )


def _check_trees(config: Config) -> None:
    """What goes with trees of tokens; those of a flow model grow elsewhere."""
    rollout, algo, tree = config.rollout, config.algo, config.rollout.tree
    of_tokens = tree.num_trees > 0
    if of_tokens and algo.adv_estimator != "tree":
        raise ConfigError(
            f"rollout.tree.num_trees = {tree.num_trees} grows trees, and algo.adv_estimator="
            f"{algo.adv_estimator} compares flat samples: use an algorithm for trees, e.g. "
            "algo.loss_type=branch_grpo, or rollout.tree.num_trees=0"
        )
    if not of_tokens and algo.adv_estimator == "tree":
        raise ConfigError(
            f"algo.adv_estimator=tree (loss_type={algo.loss_type}) gives credit in trees, and "
            "rollout.tree.num_trees = 0 grows none: set it, e.g. to 2; trees of a flow model come "
            "with rollout.engine=flow"
        )
    if not of_tokens:
        return
    refused = {
        f"rollout.engine={rollout.engine}": rollout.engine == "none",
        f"task.completions={config.task.completions}": config.task.completions != "rollout",
        f"rollout.max_lag = {rollout.max_lag}": rollout.max_lag > 0,
    }
    if wrong := [setting for setting, holds in refused.items() if holds]:
        raise ConfigError(
            f"{wrong[0]} does not go with trees of tokens (rollout.tree.num_trees = "
            f"{tree.num_trees}), which are drawn from the policy of the step: use "
            "rollout.engine=hf, vllm or server, task.completions=rollout and rollout.max_lag=0"
        )
    if not tree.branch_factor or min(tree.branch_factor) < 1:
        raise ConfigError(
            f"rollout.tree.branch_factor = {tree.branch_factor}: numbers of children, at least 1, "
            "e.g. [2]"
        )
    compares_trees = algo.tree.scope == "prompt" or algo.tree.advantage == "leaves"
    if _is_chain(config) and not (compares_trees and config.rollout.tree.num_trees > 1):
        raise ConfigError(
            "rollout.tree: these trees never branch, so there is nothing to compare: raise "
            "branch_factor or max_leaves (num_rounds under surprisal), or compare several trees of "
            "a prompt: rollout.tree.num_trees, algo.tree.scope=prompt"
        )


def _is_chain(config: Config) -> bool:
    tree = config.rollout.tree
    if tree.max_leaves == 1:
        return True
    if tree.segmenter == "surprisal":
        return tree.num_rounds == 0
    whole = config.rollout.max_completion_length  # a first segment of that length never splits
    reached = 1 if not tree.align and tree.segment_length >= whole else tree.max_depth
    return max(tree.branch_factor[:reached]) == 1


def _check_completions(config: Config) -> None:
    """What goes with training on completions of the data, and without an engine."""
    task, rollout, mismatch = config.task, config.rollout, config.algo.mismatch
    if rollout.engine == "none" and task.completions != "dataset":
        raise ConfigError(
            f"rollout.engine=none samples nothing, and task.completions={task.completions} needs "
            "samples: set task.completions=dataset, with data that holds scored completions, or "
            "use rollout.engine=hf, vllm or server"
        )
    if rollout.engine == "none" and task.eval:
        raise ConfigError(
            f"rollout.engine=none samples nothing, and task.eval = {task.eval!r} needs samples: "
            "set task.eval=null and evaluate a checkpoint afterwards (`rlalign eval CONFIG "
            "rollout.engine=hf task.eval=... --checkpoint DIR`), or use rollout.engine=hf, which "
            "evaluates in this process"
        )
    if task.completions == "rollout":
        return
    check_transform(task.scored)
    if (
        task.completions == "mixed"
        and task.scored.rescore
        and task.scored.score_transform != "none"
    ):
        raise ConfigError(
            f"task.scored.score_transform={task.scored.score_transform} is for the data's scores, "
            "which task.completions=mixed does not use: set task.scored.rescore=false, or "
            "score_transform=none"
        )
    if rollout.oversample > 1 or (rollout.max_lag and task.completions == "dataset"):
        raise ConfigError(
            f"rollout.oversample = {rollout.oversample:g}, rollout.max_lag = {rollout.max_lag}: "
            f"with task.completions={task.completions} groups do not come from the engine alone. "
            "Set rollout.oversample=1"
            + (" and rollout.max_lag=0" if task.completions == "dataset" else "")
        )
    if config.algo.allocation.allocator not in (None, "uniform"):
        raise ConfigError(
            f"algo.allocation.allocator = {config.algo.allocation.allocator} shares samples of the "
            f"policy out: use allocator=uniform with task.completions={task.completions}"
        )
    for key in ("bypass_mode", "rollout_is_batch_normalize"):
        if getattr(mismatch, key):
            raise ConfigError(
                f"algo.mismatch.{key} needs the log-probs that completions were drawn with, which "
                f"the data does not have: set it to false with task.completions={task.completions}"
            )


def _check_sources(config: Config) -> None:
    if config.algo.copg.compare_sources and config.task.completions == "rollout":
        raise ConfigError(
            "algo.copg.compare_sources=true compares completions of different sources, and "
            "task.completions=rollout has one, the policy: set it to false, or use "
            "task.completions=mixed"
        )


def check_scored(scored: ScoredSet, config: Config) -> None:
    """Raise ConfigError where no two completions of a prompt would be compared."""
    if not config.algo.copg.compare_sources or config.task.completions != "dataset":
        return
    groups = (scored[prompt.id].group for prompt in scored.prompts)
    if not any(len({sample.source_id for sample in group.samples}) > 1 for group in groups):
        raise ConfigError(
            "algo.copg.compare_sources=true compares completions of different sources, and no "
            f"prompt of {config.task.train} has two (the column `source`: "
            f"{', '.join(map(repr, scored.sources))}): set it to false, or use "
            "task.completions=mixed, which adds samples of the policy"
        )


def check_no_masks(scored: ScoredSet, mask_id: int) -> None:
    """Raise ConfigError for a mask token in what the data brings along: in a completion it has no
    probability, in a prompt it is a hole."""
    for prompt in scored.prompts:
        samples = scored[prompt.id].group.samples
        if mask_id in prompt.token_ids or any(mask_id in s.token_ids for s in samples):
            raise ConfigError(
                f"prompt {prompt.id!r} or one of its completions holds the mask token {mask_id}, "
                "which stands for what is not known: take it out of the data"
            )


def _check_rewards(config: Config) -> None:
    scores_needed = config.task.completions != "dataset" or config.task.eval
    if not config.rewards.functions and scores_needed:
        raise ConfigError(
            "rewards.functions is empty: name at least one, e.g. [{name: exact_match}]"
        )
    if config.task.eval and accuracy_index(config.rewards) is None:
        names = ", ".join(spec.name for spec in config.rewards.functions)
        raise ConfigError(
            f"task.eval is set, but which of the rewards ({names}) says that an answer is right? "
            "Mark it with accuracy: true (weight: 0 keeps it out of the reward), or set "
            "task.eval=null"
        )


def _check_trainer(config: Config) -> None:
    trainer = config.trainer
    if trainer.engine == "torch":
        for key in ("zero_stage", "offload_optimizer", "offload_param"):
            if getattr(trainer, key):
                raise ConfigError(f"trainer.{key} needs trainer.engine=deepspeed, got torch")
    if trainer.offload_param and trainer.zero_stage < 3:
        raise ConfigError(
            f"trainer.offload_param needs trainer.zero_stage=3, got {trainer.zero_stage}"
        )
    if trainer.offload_optimizer and trainer.zero_stage < 1:
        raise ConfigError("trainer.offload_optimizer needs trainer.zero_stage >= 1, got 0")


def _check_vllm(config: Config) -> None:
    from rlalign.rollout.limits import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE

    rollout = config.rollout
    if not LOWEST_TEMPERATURE <= rollout.temperature <= HIGHEST_TEMPERATURE:
        raise ConfigError(
            f"rollout.temperature = {rollout.temperature}; vLLM samples at {LOWEST_TEMPERATURE} to "
            f"{HIGHEST_TEMPERATURE}: use such a value, or rollout.engine=hf"
        )
    wanted = config.task.max_prompt_length + rollout.max_completion_length
    if rollout.vllm.max_model_len is not None and rollout.vllm.max_model_len < wanted:
        raise ConfigError(
            f"rollout.vllm.max_model_len = {rollout.vllm.max_model_len}, but task.max_prompt_length"
            f" + rollout.max_completion_length = {wanted}: leave it unset, or lower one of the two"
        )
