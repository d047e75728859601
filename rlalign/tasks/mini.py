"""`mini:<task>`: tasks that generate their own data, each with a model small enough for a CPU.

A mini task is one module here that defines `TASK`, and one line in `MINI_TASKS`. The rows and the
demonstrations are plain functions of a seed; `models/mini.py` turns the recipe into weights.
`MiniTask` is for language models, `MiniFlowTask` for flow models, `MaskedMiniTask` for diffusion
language models.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlalign.tasks.errors import TaskError
from rlalign.tasks.source import Source, numbered

MINI_TASKS = {
    "chain": "rlalign.tasks.chain",
    "digits": "rlalign.tasks.digits",
    "sort6": "rlalign.tasks.sort:SORT6",
    "sort16": "rlalign.tasks.sort:SORT16",
}


@dataclass(frozen=True)
class WarmStart:
    """A phase of supervised training: `steps` batches of demonstrations, (prompt, completion)
    pairs that `demonstrations(seed)` yields without end. Both rates fall to 0 at the end."""

    name: str
    steps: int
    lr: float  # Muon, for the matrices
    adamw_lr: float  # for embeddings, biases and norms
    demonstrations: Callable[[int], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class MiniModel:
    """The shape of a mini model (a Qwen2 with tied embeddings) and its training before RL."""

    phases: tuple[WarmStart, ...]
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    max_positions: int = 512
    batch_size: int = 24
    weight_decay: float = 0.5  # of the matrices, decoupled: with it arithmetic is found sooner
    eval_size: int = 200  # held-out questions on which the start is measured
    max_new_tokens: int = 64


@dataclass(frozen=True)
class MiniTask:
    """`make_rows(split, **params)` gives rows; `is_correct(prompt, completion)` judges a text."""

    name: str
    make_rows: Callable[..., list[dict[str, Any]]]
    is_correct: Callable[[str, str], bool]
    model: MiniModel


@dataclass(frozen=True)
class FlowTraining:
    """The shape of a mini flow model (rlalign/models/mini_flow.py) and its training before RL.

    A label is replaced by a random one with probability `label_noise`, which leaves a policy that
    follows its prompt about half of the time; then by none at all with `null_share`, for guidance.
    """

    labels: tuple[str, ...]  # the prompts it knows
    net: str = "mlp"
    width: int = 192
    blocks: int = 3
    steps: int = 2500
    batch_size: int = 192
    lr: float = 4e-3  # AdamW; falls to 0 as a cosine does
    label_noise: float = 0.45
    null_share: float = 0.1
    ema: float = 0.995  # of the weights that are kept


@dataclass(frozen=True)
class MiniFlowTask:
    """`make_rows(split, **params)` gives rows whose prompts are labels of the model."""

    name: str
    make_rows: Callable[..., list[dict[str, Any]]]
    model: FlowTraining


@dataclass(frozen=True)
class MaskedTraining:
    """The shape of a mini diffusion language model (a bidirectional Llama with tied embeddings) and
    its training before RL, on `demonstrations(seed)`: prompts of one length with completions of
    `completion_length` tokens, without end."""

    completion_length: int
    alphabet: str  # letters that texts are made of, each a token
    demonstrations: Callable[[int], Iterator[tuple[str, str]]]
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    mlp: int = 384
    max_positions: int = 128
    steps: int = 900
    batch_size: int = 128
    lr: float = 2e-3  # AdamW; falls to 0 at the end
    weight_decay: float = 0.01


@dataclass(frozen=True)
class MaskedMiniTask:
    """As `MiniTask`, of a diffusion language model."""

    name: str
    make_rows: Callable[..., list[dict[str, Any]]]
    is_correct: Callable[[str, str], bool]
    model: MaskedTraining


def get_mini_task(name: str) -> MiniTask | MiniFlowTask | MaskedMiniTask:
    """Raises TaskError for a task that is not built in."""
    if name not in MINI_TASKS:
        raise TaskError(
            f"there is no mini task {name!r}; built in: {', '.join(sorted(MINI_TASKS))}"
        )
    module, _, attribute = MINI_TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute or "TASK")


def open_mini(name: str, params: Mapping[str, Any], split: str) -> Source:
    """Raises TaskError for an unknown task or parameter."""
    task = get_mini_task(name)
    try:
        rows = task.make_rows(split, **params)
    except TypeError as error:
        raise TaskError(f"mini:{name} refuses the parameters {dict(params)}: {error}") from error
    return Source(f"mini:{name}:{split}", numbered(rows))
