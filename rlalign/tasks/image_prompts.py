"""Prompts of image models: the same data and loaders as for language models, without a tokenizer.

A flow model reads the text itself (`Prompt.source`), so the token ids of a prompt say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlalign.config.schema import TaskConfig
from rlalign.tasks.load import load_prompts
from rlalign.tasks.prompt_set import PromptSet


def load_image_prompts(cfg: TaskConfig, *, split: str, seed: int = 0) -> PromptSet:
    """The prompts of `cfg.train` (split "train") or `cfg.eval` (split "eval"); see `load_prompts`.

    Each has the one token id 0. Raises TaskError as `load_prompts` does, chat messages included.
    """
    return load_prompts(cfg, _OneToken(), split=split, seed=seed)


class _OneToken:
    """What a tokenizer is to the loader, for models that have none."""

    chat_template = None

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] for _ in texts]}
