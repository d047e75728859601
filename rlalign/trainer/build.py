"""Building a run: everything is checked and built before the run directory is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rlalign import algos
from rlalign.config import Config, ConfigError
from rlalign.models.load import load_tokenizer, resolve_model_path
from rlalign.models.lora import adapter_config
from rlalign.rewards import Scorer, build_scorer
from rlalign.rewards import check as check_rewards
from rlalign.rollout.engine import RolloutEngine
from rlalign.rollout.hf import eos_token_ids
from rlalign.rollout.masked_diffusion import MaskedDiffusionEngine
from rlalign.rollout.no_engine import NoEngine
from rlalign.tasks import PromptSet, ScoredSet, load_prompts, load_scored
from rlalign.tracking.rundir import RunDir
from rlalign.trainer.checks import check_context, check_no_masks, check_scored
from rlalign.trainer.distributed import World
from rlalign.trainer.elbo import ElboLikelihood
from rlalign.trainer.engine import TorchEngine, TrainEngine
from rlalign.trainer.evaluate import EvalResult, run_evaluation
from rlalign.trainer.job import AnyPolicy, Job
from rlalign.trainer.likelihood import Likelihood
from rlalign.trainer.masked_policy import MaskedPolicy
from rlalign.trainer.opening import Observers, entered, open_run
from rlalign.trainer.policy import Policy
from rlalign.trainer.reference_cache import reference_logps
from rlalign.trainer.token_likelihood import TokenLikelihood

RewardFunctions = Mapping[str, Callable[..., Any]]


@contextmanager
def open_job(
    config: Config,
    *,
    resume: bool = False,
    reward_functions: RewardFunctions | None = None,
    make_observers: Observers = lambda config, run_dir: (),
) -> Iterator[Job]:
    """Build a run's parts in the order in which they can fail cheaply, and close them at the end.

    Configuration and data come before models, models before engines; the run directory is created
    last. With `resume` the newest complete checkpoint of the run is loaded (see
    `rundir.run_to_resume`). `reward_functions` are callables that `rewards.functions` names.
    """

    def assemble(world: World, run_dir: RunDir, stack: ExitStack) -> Job:
        return _assemble(config, world, run_dir, reward_functions or {}, stack)

    with open_run(config, assemble, resume=resume, make_observers=make_observers) as job:
        yield job


def _assemble(
    config: Config, world: World, run_dir: RunDir, functions: RewardFunctions, stack: ExitStack
) -> Job:
    with world.agreed("loading data and model"):
        tokenizer = load_tokenizer(config.model, config.seed)
        train = load_prompts(config.task, tokenizer, split="train", seed=config.seed)
        scored = _load_scored(train, tokenizer, config)
        train = scored.prompts if scored is not None else train
        held_out = load_prompts(config.task, tokenizer, split="eval") if config.task.eval else None
        known = config.task.completions == "dataset"  # every sequence that will train, scores too
        judged = [*([] if known else [train]), *([held_out] if held_out else [])]
        scorer = _open_scorer(config, judged, functions, stack)
        needed = algos.needs_reference(config.algo)
        cached = known and config.rollout.engine != "masked_diffusion"  # whose masks change
        policy = _load_policy(config, world, with_reference=needed and not cached)
        if isinstance(policy, MaskedPolicy) and scored is not None:
            check_no_masks(scored, policy.lm.mask_id)
    engine = build_train_engine(policy, config, world)
    stack.callback(engine.close)
    reference = None
    if needed and cached and scored is not None and isinstance(policy, Policy):
        reference = reference_logps(scored, policy, engine, config, world)
    rollout = build_rollout_engine(policy, tokenizer, config, world)
    stack.callback(rollout.close)
    return Job(
        config=config,
        world=world,
        engine=engine,
        run_dir=run_dir,
        train_prompts=train,
        eval_prompts=held_out,
        tokenizer=tokenizer,
        scorer=scorer,
        policy=policy,
        rollout=rollout,
        scored=scored,
        reference=reference,
        likelihood=_likelihood(policy, tokenizer),
    )


def _likelihood(policy: AnyPolicy, tokenizer) -> Likelihood:
    if isinstance(policy, MaskedPolicy):
        return ElboLikelihood(policy, eos_token_ids(policy.model, tokenizer))
    return TokenLikelihood()


def _load_scored(prompts: PromptSet, tokenizer, config: Config) -> ScoredSet | None:
    """The completions that the training data brings along, where they are trained on."""
    if config.task.completions == "rollout":
        return None
    limit = config.rollout.max_completion_length
    scored = load_scored(prompts, config.task, tokenizer, max_completion_length=limit)
    check_scored(scored, config)
    return scored


@contextmanager
def open_evaluation(
    config: Config, *, reward_functions: RewardFunctions | None = None
) -> Iterator[Callable[[], EvalResult]]:
    """Yields a function that evaluates `config.model` on `config.task.eval`; trains nothing.

    Raises ConfigError where there is no held-out data.
    """
    if not config.task.eval:
        raise ConfigError("task.eval is not set: name the held-out data, e.g. task.eval=test.jsonl")
    with ExitStack() as stack:
        world = stack.enter_context(entered(config))
        tokenizer = load_tokenizer(config.model, config.seed)
        prompts = load_prompts(config.task, tokenizer, split="eval")
        scorer = _open_scorer(config, [prompts], reward_functions or {}, stack)
        policy = _load_policy(config, world, with_reference=False)
        rollout = build_rollout_engine(policy, tokenizer, config, world)
        stack.callback(rollout.close)
        yield lambda: run_evaluation(rollout, scorer, list(prompts), config, world)


def _open_scorer(
    config: Config,
    prompt_sets: Sequence[PromptSet],
    functions: RewardFunctions,
    stack: ExitStack,
) -> Scorer:
    rewards, limit = config.rewards, config.rollout.max_completion_length
    if idle := sorted(functions.keys() - {spec.name for spec in rewards.functions}):
        raise ConfigError(
            f"reward_functions holds {', '.join(map(repr, idle))}, which rewards.functions does not"
            f" name: add e.g. {{name: {idle[0]}}} there"
        )
    if not prompt_sets:
        return Scorer(rewards, config.algo, limit, runners=[])
    for prompts in prompt_sets:
        check_rewards(rewards, prompts.columns, functions=functions)
    scorer = build_scorer(rewards, config.algo, limit, functions=functions)
    stack.callback(scorer.close)
    return scorer


def _load_policy(config: Config, world: World, *, with_reference: bool) -> AnyPolicy:
    if config.rollout.engine == "masked_diffusion":
        masked = MaskedPolicy.from_config(
            config, device=world.device, with_reference=with_reference
        )
        check_context(masked.model.config.get_text_config(), config)
        return masked
    policy = Policy.from_config(
        config.model,
        seed=config.seed,
        device=world.device,
        with_reference=with_reference,
        packing=config.trainer.packing,
        kernels=config.kernels,
    )
    check_context(policy.model.config.get_text_config(), config)
    return policy


def build_train_engine(policy: nn.Module, config: Config, world: World) -> TrainEngine:
    dtype = getattr(torch, config.model.dtype)
    if config.trainer.engine == "torch":
        return TorchEngine(policy, config.trainer.optim, dtype=dtype, world=world)
    from rlalign.trainer.deepspeed_engine import DeepSpeedEngine  # importing it takes seconds

    return DeepSpeedEngine(policy, config.trainer, dtype=dtype, world=world)


def build_rollout_engine(
    policy: AnyPolicy, tokenizer, config: Config, world: World
) -> RolloutEngine:
    if config.rollout.engine == "server":
        return _join_server(policy, tokenizer, config, world)
    with world.agreed("starting the rollout engine"):
        return _start_engine(policy, tokenizer, config, world)


def _start_engine(policy: AnyPolicy, tokenizer, config: Config, world: World) -> RolloutEngine:
    if config.rollout.engine == "none":
        return NoEngine()
    if isinstance(policy, MaskedPolicy):
        return MaskedDiffusionEngine(
            policy.lm,
            tokenizer,
            config.rollout.diffusion,
            max_batch_size=config.rollout.max_batch_size,
        )
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


def _join_server(policy: AnyPolicy, tokenizer, config: Config, world: World) -> RolloutEngine:
    """One lease for all processes of the job: the main one takes it."""
    from rlalign.rollout.client import RolloutClient

    if world.size > 1 and config.rollout.max_lag:
        raise ConfigError(
            f"rollout.max_lag = {config.rollout.max_lag} is for a run of one process, this one has "
            f"{world.size}: use rollout.max_lag=0"
        )
    adapter = adapter_config(policy.model) if config.model.lora.rank else None
    parts = config.name, tokenizer, config.rollout.server, adapter
    client = None
    with world.agreed("taking a lease on the rollout server"):
        if world.is_main:
            client = RolloutClient(*parts)
    lease = None if client is None else json.dumps(client.lease).encode()
    shared = json.loads(world.broadcast_bytes(lease, "the lease"))
    with world.agreed("sharing the lease"):
        return client or RolloutClient(*parts, lease=shared)
