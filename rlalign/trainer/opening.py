"""Opening a run: what is the same whatever is trained.

Everything is built before the run directory is written, so a run that cannot start leaves nothing
behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from transformers.utils.logging import disable_progress_bar

from rlalign.config import Config, to_yaml
from rlalign.tracking.observers import Observer
from rlalign.tracking.rundir import (
    RunDir,
    RunDirError,
    changed_settings,
    free_run_dir,
    make_manifest,
    run_to_resume,
)
from rlalign.trainer import checkpoint
from rlalign.trainer.checks import check_config, check_machine
from rlalign.trainer.distributed import World, joined_world
from rlalign.trainer.host_memory import keep_freed_memory
from rlalign.trainer.job import Run

Observers = Callable[[Config, RunDir], Sequence[Observer]]
AnyRun = TypeVar("AnyRun", bound=Run)
Assemble = Callable[[World, RunDir, ExitStack], AnyRun]

log = logging.getLogger(__name__)


@contextmanager
def open_run(
    config: Config, assemble: Assemble[AnyRun], *, resume: bool, make_observers: Observers
) -> Iterator[AnyRun]:
    """Join the job's processes, let `assemble` build the parts, then create the run directory, or
    with `resume` load the newest complete checkpoint (see `rundir.run_to_resume`); all is closed
    at the end."""
    with ExitStack() as stack:
        world = stack.enter_context(entered(config))
        run_dir, start = _choose_run_dir(config, resume, world)
        job = assemble(world, run_dir, stack)
        if resume:
            _check_same_run(job)
        if start is not None:
            job.load_checkpoint(start)
        with world.agreed("opening the run directory"):
            if world.is_main:
                _open_run_dir(job, resume)
                job.observers = make_observers(config, run_dir)
                for observer in job.observers:
                    stack.callback(observer.close)
        yield job


@contextmanager
def entered(config: Config) -> Iterator[World]:
    """The checked beginning of every job: threads, memory, processes; no others' progress bars."""
    check_config(config)
    check_machine(config)
    disable_progress_bar()
    if config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)
    keep_freed_memory()
    with joined_world(config.trainer.device, config.trainer.exchange_timeout_s) as world:
        yield world


def _choose_run_dir(config: Config, resume: bool, world: World) -> tuple[RunDir, Path | None]:
    """The run directory and, with `resume`, the checkpoint to start from."""
    runs_dir = Path(config.tracking.runs_dir)
    if not resume:
        name = free_run_dir(runs_dir, config.name).path.name if world.is_main else ""
        # The main process decides: by the time the others look, its folder may be there.
        return RunDir(runs_dir / world.broadcast_bytes(name.encode(), "run name").decode()), None
    run_dir = run_to_resume(runs_dir, config.name)
    return run_dir, checkpoint.latest(run_dir.checkpoints)


def _check_same_run(job: Run) -> None:
    """Raise RunDirError unless seed and training data are those that the run began with: otherwise
    the prompts already taken would not be those that the checkpoint counts."""
    manifest = job.run_dir.read_manifest()
    ours = {"seed": job.config.seed, "training data": job.train_prompts.digest}
    theirs = {"seed": manifest["seed"], "training data": manifest["data_digests"]["train"]}
    for what, value in ours.items():
        if value != theirs[what]:
            raise RunDirError(
                f"--resume: {job.run_dir.path} began with {what} {theirs[what]}, now it is {value}."
                " Restore it, or start a new run: model.path can be one of its checkpoints"
            )


def _open_run_dir(job: Run, resume: bool) -> None:
    """Create the folder, or drop what an interrupted run recorded after its last checkpoint."""
    settings = to_yaml(job.config)
    if resume:
        for change in changed_settings(job.run_dir.config.read_text(), settings):
            log.warning("resuming %s with another %s", job.run_dir.path, change)
        done = job.progress.step >= job.config.trainer.max_steps
        job.run_dir.reopen(job.progress.step, settings, keep_result=done)
        return
    prompts = {"train": job.train_prompts, "eval": job.eval_prompts}
    digests = {split: found.digest for split, found in prompts.items() if found is not None}
    manifest = make_manifest(job.config.seed, digests, job.world.size)
    job.run_dir.create(settings, manifest)
