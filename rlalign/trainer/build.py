"""Building a run: everything is checked and built before the run directory is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from rlalign import algos
from rlalign.config import Config, ConfigError, to_yaml
from rlalign.models.load import load_tokenizer, resolve_model_path
from rlalign.rewards import Scorer, build_scorer
from rlalign.rewards import check as check_rewards
from rlalign.rollout.engine import RolloutEngine
from rlalign.tasks import PromptSet, load_prompts
from rlalign.tracking.observers import Observer
from rlalign.tracking.rundir import RunDir, RunDirError, free_run_dir, make_manifest
from rlalign.trainer import checkpoint
from rlalign.trainer.distributed import World, joined_world
from rlalign.trainer.engine import TorchEngine, TrainEngine
from rlalign.trainer.evaluate import EvalResult, run_evaluation
from rlalign.trainer.job import Job
from rlalign.trainer.policy import Policy


@contextmanager
def open_job(
    config: Config,
    *,
    resume: bool = False,
    make_observers: Callable[[Config, RunDir], Sequence[Observer]] = lambda config, run_dir: (),
) -> Iterator[Job]:
    """Build a run's parts in the order in which they can fail cheaply, and close them at the end.

    Configuration and data come before models, models before engines; the run directory is created
    last. With `resume` the newest complete checkpoint of `runs_dir/name` is loaded.
    """
    check_config(config)
    if config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)
    with ExitStack() as stack:
        world = stack.enter_context(joined_world(config.trainer.device))
        run_dir, start = _choose_run_dir(config, resume, world)
        job = _assemble(config, world, run_dir, stack)
        if start is not None:
            job.load_checkpoint(start)
        if world.is_main:
            _open_run_dir(job, resume)
            job.observers = make_observers(config, run_dir)
            for observer in job.observers:
                stack.callback(observer.close)
        yield job


def _assemble(config: Config, world: World, run_dir: RunDir, stack: ExitStack) -> Job:
    tokenizer = load_tokenizer(config.model, config.seed)
    train = load_prompts(config.task, tokenizer, split="train")
    held_out = load_prompts(config.task, tokenizer, split="eval") if config.task.eval else None
    scorer = _open_scorer(config, [train, *([held_out] if held_out else [])], stack)
    policy = _load_policy(config, world)
    engine = build_train_engine(policy, config, world)
    stack.callback(engine.close)
    rollout = build_rollout_engine(policy, tokenizer, config, world)
    stack.callback(rollout.close)
    return Job(config, world, tokenizer, train, held_out, scorer, policy, engine, rollout, run_dir)


@contextmanager
def open_evaluation(config: Config) -> Iterator[Callable[[], EvalResult]]:
    """Yields a function that evaluates `config.model` on `config.task.eval`; trains nothing.

    Raises ConfigError where there is no held-out data.
    """
    check_config(config)
    if not config.task.eval:
        raise ConfigError("task.eval is not set: name the held-out data, e.g. task.eval=test.jsonl")
    with ExitStack() as stack:
        world = stack.enter_context(joined_world(config.trainer.device))
        tokenizer = load_tokenizer(config.model, config.seed)
        prompts = load_prompts(config.task, tokenizer, split="eval")
        scorer = _open_scorer(config, [prompts], stack)
        policy = _load_policy(config, world)
        rollout = build_rollout_engine(policy, tokenizer, config, world)
        stack.callback(rollout.close)
        yield lambda: run_evaluation(rollout, scorer, list(prompts), config, world)


def _open_scorer(config: Config, prompt_sets: Sequence[PromptSet], stack: ExitStack) -> Scorer:
    for prompts in prompt_sets:
        check_rewards(config.rewards, prompts.columns)
    scorer = build_scorer(config.rewards, config.algo, config.rollout.max_completion_length)
    stack.callback(scorer.close)
    return scorer


def _load_policy(config: Config, world: World) -> Policy:
    policy = Policy.from_config(
        config.model,
        seed=config.seed,
        device=world.device,
        with_reference=algos.needs_reference(config.algo),
        packing=config.trainer.packing,
    )
    check_context(policy.model.config.get_text_config(), config)
    return policy


def check_config(config: Config) -> None:
    """Raise ConfigError for settings that are each valid and do not go together."""
    trainer, model = config.trainer, config.model
    if not config.rewards.functions:
        raise ConfigError(
            "rewards.functions is empty: name at least one, e.g. [{name: exact_match}]"
        )
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
    if trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.device = 'cuda', but this machine has no usable GPU. Use trainer.device=auto "
            "(or cpu), or start from configs/grpo/mini.yaml, which is made for a CPU."
        )
    if model.lora.rank and config.rollout.engine == "hf" and model.lora.dropout:
        raise ConfigError(
            "model.lora.dropout must be 0 with rollout.engine=hf: both share the model"
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


def build_train_engine(policy: Policy, config: Config, world: World) -> TrainEngine:
    dtype = getattr(torch, config.model.dtype)
    if config.trainer.engine == "torch":
        return TorchEngine(policy, config.trainer.optim, dtype=dtype, world=world)
    from rlalign.trainer.deepspeed_engine import DeepSpeedEngine  # importing it takes seconds

    return DeepSpeedEngine(policy, config.trainer, dtype=dtype, world=world)


def build_rollout_engine(policy: Policy, tokenizer, config: Config, world: World) -> RolloutEngine:
    if config.rollout.engine == "hf":
        from rlalign.rollout.hf import HFEngine

        return HFEngine(policy.model, tokenizer, max_batch_size=config.rollout.max_batch_size)
    from rlalign.rollout.vllm import VllmEngine

    return VllmEngine(
        resolve_model_path(config.model.path, config.seed),
        tokenizer,
        config.rollout,
        dtype=config.model.dtype,
        max_prompt_length=config.task.max_prompt_length,
        seed=config.seed,
        device=world.device.type,
    )


def _choose_run_dir(config: Config, resume: bool, world: World) -> tuple[RunDir, Path | None]:
    """The run directory and, with `resume`, the checkpoint to start from."""
    runs_dir = Path(config.tracking.runs_dir)
    if not resume:
        name = free_run_dir(runs_dir, config.name).path.name if world.is_main else ""
        # The main process decides: by the time the others look, its folder may be there.
        return RunDir(runs_dir / world.broadcast_bytes(name.encode(), "run name").decode()), None
    run_dir = RunDir(runs_dir / config.name)
    if not run_dir.path.is_dir():
        known = sorted(p.name for p in runs_dir.glob("*") if p.is_dir())
        raise RunDirError(
            f"--resume: there is no run at {run_dir.path}; known runs: {', '.join(known) or 'none'}"
        )
    return run_dir, checkpoint.latest(run_dir.checkpoints)


def _open_run_dir(job: Job, resume: bool) -> None:
    """Create the folder, or drop what an interrupted run recorded after its last checkpoint."""
    if resume:
        job.run_dir.discard_after(job.progress.step)
        return
    prompts = {"train": job.train_prompts, "eval": job.eval_prompts}
    digests = {split: found.digest for split, found in prompts.items() if found is not None}
    manifest = make_manifest(job.config.seed, digests, job.world.size)
    job.run_dir.create(to_yaml(job.config), manifest)
