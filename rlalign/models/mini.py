"""The built-in mini models: a small Qwen2, trained here in about a minute, for `mini:<task>`.

Two supervised phases make a start worth aligning: right demonstrations until the task is solved,
then a few steps on demonstrations with systematic mistakes. What is left is a policy that knows how
and often does it wrong: it is right on about half of the held-out questions, and on two thirds of
them at least once in four tries, so groups of samples carry signal and there is head-room to learn.

The weights are a function of (task, seed) on one thread of one kind of machine, and kept in the
cache of models/building.py; a changed recipe gets another folder. A flow model, `mini:digits`, is
built the same way by models/digits.py, a diffusion language model by models/mini_masked.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from rlalign.models.building import Progress, build_once, digest_of, reporting, write_start
from rlalign.models.tokenizer import build_tokenizer
from rlalign.models.warm_start import greedy_accuracy, warm_start
from rlalign.tasks.mini import MaskedMiniTask, MiniFlowTask, MiniTask, get_mini_task

NUM_FINGERPRINT = 64  # demonstrations of each phase that enter the digest of a recipe


def build_mini(
    task: str, seed: int, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The folder of the model of `mini:<task>`: from the cache, or built now.

    `start.json` in it records how good the start is: the greedy accuracy on held-out questions, or
    what a flow model's images are worth. Of several builders of the same folder one works and the
    others wait, at most 15 minutes.
    Raises TaskError for an unknown task, ModelError when that wait ends in vain or the cache cannot
    be written.
    """
    recipe = get_mini_task(task)
    if isinstance(recipe, MiniFlowTask):
        from rlalign.models.digits import build_digits  # it needs scikit-learn

        return build_digits(recipe, seed, cache_dir, progress)

    if isinstance(recipe, MaskedMiniTask):
        from rlalign.models.mini_masked import build_masked

        return build_masked(recipe, seed, cache_dir, progress)

    def write(folder: Path) -> None:
        _write_model(recipe, seed, folder, progress)

    return build_once(f"{task}-seed{seed}-{recipe_digest(recipe, seed)}", write, cache_dir)


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
    return digest_of([shape, phases, tokenizer.get_vocab()])


def _write_model(task: MiniTask, seed: int, folder: Path, progress: Progress | None) -> None:
    tokenizer = build_tokenizer(task.model.max_positions)
    with reporting(f"mini:{task.name}", progress) as report:
        model = warm_start(task, seed, tokenizer, report)
        greedy = greedy_accuracy(model, tokenizer, task)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    num_questions = task.model.eval_size
    write_start(
        folder, f"mini:{task.name}", seed, greedy_accuracy=greedy, num_questions=num_questions
    )
