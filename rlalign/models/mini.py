"""The built-in mini models: a small Qwen2, trained here in about a minute, for `mini:<task>`.

Two supervised phases make a start worth aligning: right demonstrations until the task is solved,
then a few steps on demonstrations with systematic mistakes. What is left is a policy that knows how
and often does it wrong: it is right on about half of the held-out questions, and on two thirds of
them at least once in four tries, so groups of samples carry signal and there is head-room to learn.

The weights are a function of (task, seed) on one thread of one kind of machine. They are built in a
temporary folder, put in place by one rename, and kept in `$RLALIGN_CACHE` (default
`~/.cache/rlalign`); a changed recipe gets another folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from rlalign.models.errors import ModelError
from rlalign.models.tokenizer import build_tokenizer
from rlalign.models.warm_start import Progress, greedy_accuracy, warm_start
from rlalign.tasks.mini import MiniTask, get_mini_task

START_FILE = "start.json"
LOCK_TIMEOUT_S = 900.0
NUM_FINGERPRINT = 64  # demonstrations of each phase that enter the digest of a recipe


def build_mini(
    task: str, seed: int, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The HF folder of the model of `mini:<task>`: from the cache, or built now.

    `start.json` in it records the greedy accuracy on held-out questions. Of several builders of the
    same folder one works and the others wait, at most 15 minutes.
    Raises TaskError for an unknown task, ModelError when that wait ends in vain or the cache cannot
    be written.
    """
    recipe = get_mini_task(task)
    root = (cache_dir or default_cache_dir()) / "models"
    folder = root / f"{task}-seed{seed}-{recipe_digest(recipe, seed)}"
    if folder.is_dir():
        return folder
    with _locked(root, folder.name):
        if not folder.is_dir():
            _build_in_place(recipe, seed, folder, progress)
    return folder


def default_cache_dir() -> Path:
    return Path(os.environ.get("RLALIGN_CACHE") or "~/.cache/rlalign").expanduser()


def recipe_digest(task: MiniTask, seed: int) -> str:
    """12 hex digits over all that decides the weights: shape, phases, the demonstrations
    themselves (the first of each phase), and the vocabulary."""
    tokenizer = build_tokenizer()
    phases = [
        [
            p.name,
            p.steps,
            p.lr,
            p.adamw_lr,
            list(itertools.islice(p.demonstrations(seed), NUM_FINGERPRINT)),
        ]
        for p in task.model.phases
    ]
    shape = dataclasses.asdict(dataclasses.replace(task.model, phases=()))
    content = json.dumps([shape, phases, tokenizer.get_vocab()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _build_in_place(task: MiniTask, seed: int, folder: Path, progress: Progress | None) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a builder that was killed
        shutil.rmtree(leftover)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    tokenizer = build_tokenizer(task.model.max_positions)
    with _reporting(f"mini:{task.name}", progress) as report:
        model = warm_start(task, seed, tokenizer, report)
        greedy = greedy_accuracy(model, tokenizer, task)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    start = {
        "task": f"mini:{task.name}",
        "seed": seed,
        "greedy_accuracy": greedy,
        "num_questions": task.model.eval_size,
        "torch": torch.__version__,
    }
    (scratch / START_FILE).write_text(json.dumps(start, indent=2) + "\n")
    os.replace(scratch, folder)


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """One builder of a folder at a time; a builder that dies frees the lock."""
    lock = FileLock(root / f".{name}.lock", timeout=LOCK_TIMEOUT_S)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ModelError(
            f"waited {LOCK_TIMEOUT_S:.0f} s for another process to build {name} in {root}; end it "
            "if it hangs, or set RLALIGN_CACHE to another folder"
        ) from error
    except OSError as error:
        raise ModelError(
            f"the model cache {root} cannot be written ({error}): set RLALIGN_CACHE to a folder "
            "that can"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _reporting(name: str, progress: Progress | None) -> Iterator[Progress]:
    """The caller's own progress function, or a line on stderr that names the stage."""
    if progress is not None:
        yield progress
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        rows: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(f"building {name} (once): {stage}", total=total)
            bars.update(rows[stage], completed=done)

        yield show
