# ruff: noqa: RUF009  (option() and section() return dataclass fields)
"""Every option there is: one dataclass per component, one sentence per field, units and ranges.

`None` in `AlgoConfig` means "whatever the chosen `loss_type` says"; `rlalign.algos.resolve` fills
it in, and `rlalign train CONFIG --dry-run` prints the result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


def option(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A config field: its default, a sentence, and the range or choices that `config.load`
    enforces."""
    rules = {"doc": doc, "ge": ge, "le": le, "gt": gt, "choices": choices}
    metadata = {key: value for key, value in rules.items() if value is not None}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: _fresh(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _fresh(default: Any) -> Any:
    return default() if isinstance(default, type) else type(default)(default)


def section(kind: type, doc: str) -> Any:
    return dataclasses.field(default_factory=kind, metadata={"doc": doc})


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
        choices=("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"),
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
        choices=("ppo_clip", "cispo", "reinforce"),
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
    prompt_weighting: str = option(
        "sample", "Every sample counts the same, or every prompt.", choices=("sample", "prompt")
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
    mask_truncated_completions: bool = option(
        False, "Truncated completions keep their reward, lose their gradient."
    )
    overlong_buffer_len: int = option(
        0,
        "Soft overlong punishment starts this many tokens before the limit; 0 switches it off.",
        ge=0,
    )
    overlong_penalty_factor: float = option(1.0, "Largest overlong punishment.", ge=0)
    num_generations: int = option(8, "Samples per prompt (group size).", ge=1)
    num_iterations: int = option(1, "Passes over one rollout batch.", ge=1)
    num_minibatches: int = option(1, "Optimizer steps per pass.", ge=1)
    entropy_coef: float = option(0.0, "Entropy bonus.", ge=0)
    filter_groups: FilterGroupsConfig = section(FilterGroupsConfig, "Dynamic sampling.")
    mismatch: MismatchConfig = section(MismatchConfig, "Engine/trainer correction.")


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


@dataclass
class VllmConfig:
    """Options of the vLLM engine."""

    gpu_memory_utilization: float = option(
        0.4, "Share of GPU memory for weights and cache.", gt=0, le=1
    )
    kv_cache_gib: int = option(1, "KV cache on a CPU, whole GiB.", ge=1)
    max_num_seqs: int = option(256, "Sequences decoded together.", ge=1)
    max_model_len: int | None = option(
        None, "Longest sequence; unset: prompt plus completion limit.", ge=1
    )
    enforce_eager: bool | None = option(
        None, "No graph capture; unset: true on a CPU, false on a GPU."
    )
    block_size: int | None = option(
        None, "Prefix-cache block, tokens; unset: 32 on a CPU, vLLM's own on a GPU."
    )
    enable_prefix_caching: bool = option(True, "Share the prompt's cache within a group.")
    sleep_mode: bool = option(True, "Free the GPU between rollouts.")
    timeout_s: float = option(
        3600.0, "Deadline of one batch of rollouts in the engine, seconds.", gt=0
    )


@dataclass
class RolloutConfig:
    """How samples are made."""

    engine: str = option(
        "vllm", "hf shares the trainer's parameters; vllm runs beside it.", choices=("hf", "vllm")
    )
    max_completion_length: int = option(256, "Longest completion, tokens.", ge=1)
    temperature: float = option(
        1.0, "Sampling temperature; the trainer's log-probs use the same.", gt=0
    )
    top_p: float = option(
        1.0, "Nucleus; 1 is off. Below 1 the ratio is no longer exact.", gt=0, le=1
    )
    top_k: int = option(0, "Keep the k likeliest tokens; 0 is off.", ge=0)
    max_batch_size: int = option(256, "Sequences the hf engine decodes together.", ge=1)
    logp_tolerance: float = option(
        0.05,
        "Largest engine/trainer log-prob difference on the check sequence after a weight update.",
        gt=0,
    )
    vllm: VllmConfig = section(VllmConfig, "vLLM's own options.")


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

    functions: list[RewardSpec] = option([], "At least one.")
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
