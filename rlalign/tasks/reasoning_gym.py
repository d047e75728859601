"""`reasoning_gym:<task>`: procedurally generated questions with their own verifiers.

Parameters: `size` (default 1000 for training, 200 for evaluation), `seed` (default 0, and 1,000,000
for evaluation; question i of a data set is generated from seed + i), and any field of the task's
own configuration. Each prompt keeps the columns `answer`, `metadata` and `reasoning_gym_task`,
which `reward` below gives back to the task's `score_answer`:

    rewards.functions: [{name: "rlalign.tasks.reasoning_gym:reward", accuracy: true}]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from rlalign.tasks.errors import TaskError
from rlalign.tasks.source import Source, numbered

SIZE = {"train": 1000, "eval": 200}
SEED = {"train": 0, "eval": 1_000_000}
ANSWER_TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def open_task(name: str, params: Mapping[str, Any], split: str) -> Source:
    """Raises TaskError where reasoning-gym is not installed, the task is unknown, or it refuses a
    parameter."""
    factory = _factory(name)
    if name not in factory.DATASETS:
        known = ", ".join(sorted(factory.DATASETS))
        raise TaskError(f"reasoning_gym has no task {name!r}; it has: {known}")
    arguments = {"size": SIZE[split], "seed": SEED[split], **params}
    try:
        dataset = factory.create_dataset(name, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise TaskError(f"reasoning_gym:{name} refuses {arguments}: {error}") from error
    return Source(f"reasoning_gym:{name}@{arguments['seed']}", numbered(_rows(name, dataset)))


def score(task: str, given: str | None, *, question: str, answer: Any, metadata: Any) -> float:
    """What the task's own verifier makes of `given`, the answer alone: 0 to 1.

    The other arguments are the row as reasoning-gym made it.
    """
    entry = {"question": question, "answer": answer, "metadata": metadata}
    return float(_scorer(task)(given, entry))


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    metadata: Sequence[Any],
    reasoning_gym_task: Sequence[str],
    **_: Any,
) -> list[float]:
    """The verifier's score of each completion's last answer tag, or of all of it without one."""
    rows = zip(prompts, completions, answer, metadata, reasoning_gym_task, strict=True)
    return [
        score(task, final_answer(_text(said)), question=_text(asked), answer=gold, metadata=data)
        for asked, said, gold, data, task in rows
    ]


def final_answer(completion: str) -> str:
    tagged = ANSWER_TAG.findall(completion)
    return tagged[-1] if tagged else completion.strip()


def _rows(name: str, dataset: Any) -> Iterator[dict[str, Any]]:
    for item in dataset:
        yield {
            "prompt": item["question"],
            "answer": item["answer"],
            "metadata": item["metadata"],
            "reasoning_gym_task": name,
        }


def _text(message: Any) -> str:
    return message if isinstance(message, str) else message[-1]["content"]


@cache
def _scorer(task: str) -> Any:
    return _factory(task).get_score_answer_fn(task)


def _factory(name: str) -> Any:
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise TaskError(
            f"reasoning_gym:{name} needs reasoning-gym: pip install 'rlalign[envs]'"
        ) from error
    return reasoning_gym.factory
