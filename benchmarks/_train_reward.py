"""The reward of both sides of `train`, alone in its file: a reward worker then starts at once."""

from __future__ import annotations

from collections.abc import Sequence


def reward(
    prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[float | None]:
    """The share of letters: cheap, and different within a group."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]
