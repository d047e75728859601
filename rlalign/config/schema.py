# ruff: noqa: RUF009  (option() and section() return dataclass fields)
"""Every option there is: one dataclass per component, one sentence per field, units and ranges.

`None` in `AlgoConfig` means "whatever the chosen `loss_type` says"; `rlalign.algos.resolve` fills
it in, and `rlalign train CONFIG --dry-run` prints the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from rlalign.config.algo import AlgoConfig, FilterGroupsConfig, MismatchConfig, OverlongConfig
from rlalign.config.allocation import AllocationConfig
from rlalign.config.copg import CopgConfig
from rlalign.config.diffusion import DiffusionConfig
from rlalign.config.fields import option, section
from rlalign.config.flow import FlowConfig, GuidanceConfig, ImageConfig, MixConfig
from rlalign.config.likelihood import LikelihoodConfig
from rlalign.config.rollout import RolloutConfig, ServeConfig, ServerConfig, VllmConfig
from rlalign.config.scored import ScoredConfig
from rlalign.config.tree import DepthPruneConfig, TokenTreeConfig, TreeConfig

__all__ = [
    "AlgoConfig",
    "AllocationConfig",
    "Config",
    "CopgConfig",
    "DepthPruneConfig",
    "DiffusionConfig",
    "FilterGroupsConfig",
    "FlowConfig",
    "GuidanceConfig",
    "ImageConfig",
    "KernelsConfig",
    "LikelihoodConfig",
    "LoraConfig",
    "MismatchConfig",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "OverlongConfig",
    "RewardSpec",
    "RewardsConfig",
    "RolloutConfig",
    "ScoredConfig",
    "ServeConfig",
    "ServerConfig",
    "TaskConfig",
    "TokenTreeConfig",
    "TrackingConfig",
    "TrainerConfig",
    "TreeConfig",
    "VllmConfig",
    "option",
    "section",
]


@dataclass
class LoraConfig:
    """Low-rank adapters (PEFT)."""

    rank: int = option(0, "Rank of the adapters; 0 trains the full model.", ge=0)
    alpha: float = option(32.0, "Scale: adapters are multiplied by alpha/rank.", gt=0)
    target_modules: str = option("all-linear", "PEFT target modules: a regex, or `all-linear`.")


@dataclass
class ModelConfig:
    """The policy."""

    path: str = option(MISSING, "HF folder or hub id, or `mini:<task>` for a model built here.")
    dtype: str = option(
        "float32", "Dtype of the weights in the forward pass.", choices=("float32", "bfloat16")
    )
    trust_remote_code: bool = option(False, "Run Python that ships with the model folder.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in backward: less memory, slower."
    )
    lora: LoraConfig = section(LoraConfig, "Low-rank adapters.")


@dataclass
class TaskConfig:
    """The prompts."""

    train: str = option(
        MISSING,
        "Data: *.jsonl, *.parquet, a saved data set folder, a hub id, reasoning_gym:<task>, "
        "verifiers:<env>, mini:<task>.",
    )
    eval: str | None = option(None, "Held-out data, same forms; unset: no evaluation.")
    params: dict[str, Any] = option(
        {}, "Keyword arguments of the loader (columns, split, size, subset, ...): docs/data.md."
    )
    eval_params: dict[str, Any] = option(
        {},
        "The same for `eval`; unset keys but split and seed fall back to `params`, where both are "
        "the same kind of source.",
    )
    system_prompt: str | None = option(None, "Put before every conversation.")
    chat_template: str | None = option(None, "Jinja template that replaces the tokenizer's own.")
    apply_chat_template: str = option(
        "auto",
        "Prompts that are plain strings become one user turn; auto: where there is a template.",
        choices=("auto", "always", "never"),
    )
    max_prompt_length: int = option(1024, "Longest prompt, in tokens.", ge=1)
    on_bad_row: str = option(
        "error", "A broken row stops the run, or is skipped and counted.", choices=("error", "skip")
    )
    shuffle: bool = option(True, "Shuffle prompts every epoch, keyed by the seed.")
    completions: str = option(
        "rollout",
        "What is trained on: samples of the policy (rollout), completions and scores that the data "
        "holds (dataset), or groups of both (mixed).",
        choices=("rollout", "dataset", "mixed"),
    )
    scored: ScoredConfig = section(ScoredConfig, "How the data's completions are read.")


@dataclass
class RewardSpec:
    """One reward function."""

    name: str = option(
        MISSING,
        "A built-in (docs/rewards.md), an import path `package.module:function`, or a key of the "
        "`reward_functions` given to `rlalign.train`.",
    )
    weight: float = option(1.0, "Factor in the weighted sum.")
    params: dict[str, Any] = option({}, "Keyword arguments of the function's factory.")
    accuracy: bool = option(
        False, "This one is the correctness that dynamic sampling and eval use."
    )


@dataclass
class RewardsConfig:
    """How good a sample is."""

    functions: list[RewardSpec] = option([], "At least one, where anything is scored.")
    timeout_s: float = option(
        60.0, "Deadline of one call of one function on one batch, seconds.", gt=0
    )
    max_error_rate: float = option(
        0.2,
        "The run stops when more than this share of one function's verdicts in a step is not ok.",
        ge=0,
        le=1,
    )
    aggregation: str = option(
        "sum",
        "Weighted sum, or normalise each function within its group first.",
        choices=("sum", "normalize_then_sum"),
    )


@dataclass
class OptimConfig:
    """The optimizer step: AdamW."""

    learning_rate: float = option(1e-6, "Peak rate.", ge=0)
    schedule: str = option("constant", "After warm-up.", choices=("constant", "linear", "cosine"))
    warmup_steps: int = option(0, "Linear warm-up, steps.", ge=0)
    weight_decay: float = option(0.0, "Decoupled.", ge=0)
    adam_beta1: float = option(0.9, "First moment decay.", ge=0, le=1)
    adam_beta2: float = option(0.999, "Second moment decay.", ge=0, le=1)
    adam_eps: float = option(1e-8, "Denominator offset.", gt=0)
    max_grad_norm: float = option(1.0, "Global gradient norm clip; 0 is off.", ge=0)


@dataclass
class TrainerConfig:
    """The loop and the engine that takes optimizer steps."""

    engine: str = option(
        "deepspeed",
        "deepspeed anywhere; torch: one process, no ZeRO.",
        choices=("deepspeed", "torch"),
    )
    max_steps: int = option(100, "Rollout batches.", ge=1)
    prompts_per_step: int = option(32, "Prompts per rollout batch, over all processes.", ge=1)
    micro_batch_tokens: int = option(
        16384, "Tokens per forward pass and process, prompts included.", ge=1
    )
    packing: bool = option(True, "No padding tokens through the model.")
    zero_stage: int = option(0, "DeepSpeed ZeRO stage.", ge=0, le=3)
    offload_optimizer: bool = option(False, "Keep optimizer state in CPU memory (ZeRO 1 and up).")
    offload_param: bool = option(False, "Keep parameters in CPU memory (ZeRO 3).")
    device: str = option(
        "auto", "cpu, cuda, or auto: cuda where there is one.", choices=("auto", "cpu", "cuda")
    )
    num_threads: int | None = option(
        None, "CPU threads of this process; unset: torch's own choice.", ge=1
    )
    eval_every: int = option(0, "Steps between evaluations; 0: before and after only.", ge=0)
    eval_samples: int = option(1, "Completions per held-out prompt; 1 is greedy.", ge=1)
    checkpoint_every: int = option(0, "Steps between checkpoints; 0: at the end only.", ge=0)
    keep_checkpoints: int = option(2, "Older ones are removed.", ge=1)
    max_skipped_steps: int = option(10, "Non-finite steps in a row before the run stops.", ge=1)
    exchange_timeout_s: float = option(
        1800.0,
        "How long a process waits for the others at one exchange before the run stops, seconds.",
        gt=0,
    )
    optim: OptimConfig = section(OptimConfig, "Optimizer.")


@dataclass
class KernelsConfig:
    """How log-probs come out of the language-model head without its logits (docs/kernels.md)."""

    backend: str = option(
        "auto",
        "triton on a GPU, torch (tiles) elsewhere; eager: all logits, to compare.",
        choices=("auto", "triton", "torch", "eager"),
    )
    chunk_size: int | None = option(None, "Rows of a tile of logits (torch).", ge=1)
    workspace_mib: int | None = option(None, "Of dL/dlogits, at once (triton); unset: 256.", ge=1)
    batch_invariant: bool = option(False, "Rows that no other row changes, to the bit (triton).")


@dataclass
class TrackingConfig:
    """What is recorded."""

    runs_dir: str = option("runs", "Parent of the run directory.")
    live: bool = option(True, "Live view in the terminal; plain lines where there is no terminal.")
    tensorboard: bool = option(False, "Also write TensorBoard events.")
    wandb: str = option("disabled", "Weights & Biases.", choices=("disabled", "offline", "online"))
    wandb_project: str = option("rlalign", "W&B project.")
    save_rollouts: bool = option(True, "Write every sample with its reward and advantage.")


@dataclass
class Config:
    """One run."""

    name: str = option(MISSING, "The run directory's name.")
    seed: int = option(0, "Keys every random choice.", ge=0, le=2**32 - 1)
    algo: AlgoConfig = section(AlgoConfig, "What is learned.")
    model: ModelConfig = section(ModelConfig, "The policy.")
    task: TaskConfig = section(TaskConfig, "The prompts.")
    rollout: RolloutConfig = section(RolloutConfig, "How samples are made.")
    rewards: RewardsConfig = section(RewardsConfig, "How good they are.")
    trainer: TrainerConfig = section(TrainerConfig, "How the weights move.")
    kernels: KernelsConfig = section(KernelsConfig, "How log-probs are computed.")
    tracking: TrackingConfig = section(TrackingConfig, "What is recorded.")
