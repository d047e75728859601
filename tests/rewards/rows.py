"""Groups as the loop hands them to a scorer."""

from __future__ import annotations

from typing import Any

from rlalign.rewards.call import Call
from rlalign.types import Group, Prompt, Sample, VersionSpan


def groups(*rows: tuple[Any, Any, list[str]], **columns: list[Any]) -> list[Group]:
    """Each row: prompt, answer, completions. A completion has one token per character."""
    made = []
    for i, (source, answer, texts) in enumerate(rows):
        own = {name: values[i] for name, values in columns.items()}
        prompt = Prompt(f"test/{i}", (1, 2), source, answer, own)
        samples = tuple(sample(prompt.id, j, text) for j, text in enumerate(texts))
        made.append(Group(prompt, samples))
    return made


def sample(prompt_id: str, index: int, text: str) -> Sample:
    span = (VersionSpan(len(text), 0),)
    ids = tuple(map(ord, text))
    return Sample(prompt_id, index, ids, (0.0,) * len(text), "stop", span, text=text)


def call(*completions: Any, **columns: list[Any]) -> Call:
    """A batch with the same prompt for every completion."""
    count = len(completions)
    ids = [[0] * len(str(completion)) for completion in completions]
    return Call(["q"] * count, list(completions), ids, columns, [f"test/{i}" for i in range(count)])
