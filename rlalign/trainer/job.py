"""One run's parts and its progress: what the loop works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlalign.config import Config
from rlalign.models.lora import adapter_weights
from rlalign.rewards import Scorer
from rlalign.rollout.engine import RolloutEngine
from rlalign.tasks import PromptSet, ScoredSet
from rlalign.tracking.observers import Observer
from rlalign.tracking.rundir import RunDir
from rlalign.trainer import checkpoint
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.likelihood import Likelihood
from rlalign.trainer.masked_policy import MaskedPolicy
from rlalign.trainer.policy import Policy
from rlalign.trainer.reference_cache import ReferenceLogps
from rlalign.trainer.token_likelihood import TokenLikelihood

AnyPolicy = Policy | MaskedPolicy


@dataclass
class Progress:
    """How far a run is: all that a checkpoint keeps besides weights and optimizer state."""

    step: int = 0  # finished rollout batches
    cursor: int = 0  # prompts taken from the training set, over all epochs
    carried: list[int] = field(default_factory=list)  # of those, begun and not trained on yet
    allocation: dict[str, Any] = field(default_factory=dict)  # trainer/allocated.py
    version: int = 0  # policy version the engine holds
    rollout_tokens: int = 0
    train_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    wall_s: float = 0.0
    eval_before: dict[str, float] = field(default_factory=dict)
    eval_after: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Run:
    """What every run has, whatever its policy: it is told what to train, and remembers how far it
    is. `progress` and `observers` are all that changes."""

    config: Config
    world: World
    engine: TrainEngine
    run_dir: RunDir
    train_prompts: PromptSet
    eval_prompts: PromptSet | None
    observers: Sequence[Observer] = ()
    progress: Progress = field(default_factory=Progress)

    @property
    def config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    def stage(self, text: str) -> None:
        if self.world.is_main:
            for observer in self.observers:
                observer.stage(text)

    def record_step(
        self,
        figures: dict[str, float],
        rows: Sequence[Mapping[str, Any]],
        trees: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Metrics line, sample file, file of trees, observers: on the main process."""
        with self.world.agreed(f"record of step {int(figures['step'])}"):
            if not self.world.is_main:
                return
            if self.config.tracking.save_rollouts:
                self.run_dir.write_rollouts(int(figures["step"]), rows)
                self.run_dir.write_trees(int(figures["step"]), trees)
            self.run_dir.append_metrics(figures)
            for observer in self.observers:
                observer.step(figures, rows)

    def save_checkpoint(self) -> None:
        """Write the checkpoint of the current step, whole or not at all."""
        self.stage(f"checkpoint of step {self.progress.step}")
        with self.engine.full_parameters():
            checkpoint.save(
                self.run_dir.checkpoints,
                self.progress.step,
                engine=self.engine,
                state=dataclasses.asdict(self.progress),
                save_model=self.save_model,
                keep=self.config.trainer.keep_checkpoints,
            )

    def load_checkpoint(self, folder: Path) -> None:
        state = checkpoint.load(folder, engine=self.engine)
        self.progress = Progress(**state)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        if self.world.is_main:
            self.run_dir.write_result(result)
            for observer in self.observers:
                observer.finish(result)
        return result

    def save_model(self, folder: Path) -> None:
        """Write what a checkpoint holds for others than the trainer."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Job(Run):
    """One run of a language model."""

    tokenizer: Any
    scorer: Scorer
    policy: AnyPolicy
    rollout: RolloutEngine
    likelihood: Likelihood = field(default_factory=TokenLikelihood)
    scored: ScoredSet | None = None  # completions of the training data, where those are used
    reference: ReferenceLogps | None = None  # of all of them, where that is all that is needed

    @property
    def samples_policy(self) -> bool:
        """Whether the policy is sampled to train on, and not only to be evaluated."""
        return self.config.task.completions != "dataset"

    @property
    def check_sequence(self) -> tuple[int, ...]:
        """Tokens on which engine and trainer are compared after every weight update."""
        ids = self.train_prompts[0].token_ids
        return (*ids, ids[0])[:64]  # at least two, and no longer than a prompt with a completion

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The rollout engine is awake and may read its weights, whoever owns them; asleep after."""
        shared = self.rollout.capabilities.shares_parameters
        with self.engine.full_parameters() if shared else nullcontext():
            self.rollout.wake()
            yield
            self.rollout.sleep()

    def rollout_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the rollout engine is sent: its own parameters back, the adapter, or the merged HF
        weights."""
        if self.rollout.capabilities.shares_parameters:
            return self.policy.model.named_parameters()
        if self.rollout.capabilities.adapter_only:
            return adapter_weights(self.policy.model)
        return self.policy.named_rollout_weights()

    def save_model(self, folder: Path) -> None:
        self.policy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
