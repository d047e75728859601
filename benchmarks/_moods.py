"""A small language that is pleasant or not: six words about somebody, most of the time good ones
for half of the names and bad ones for the other half. Its model is trained in seconds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from rlalign.models.tokenizer import build_tokenizer
from rlalign.models.warm_start import warm_start
from rlalign.rollout.search_hf import HFSearch
from rlalign.tasks.mini import MiniModel, MiniTask, WarmStart

GOOD, BAD = ("kind", "calm", "fair", "warm"), ("rude", "mean", "cold", "sour")
NUM_WORDS = 6
LIKELY = 0.6  # that a word is of the mood of the name


def rows(num: int) -> list[dict[str, Any]]:
    """Prompts: names, half of them of either mood."""
    return [{"prompt": f"{chr(65 + i % 26)}{chr(97 + i // 26 % 26)}:"} for i in range(num)]


def sentences(seed: int) -> Iterator[tuple[str, str]]:
    """Demonstrations."""
    rng = random.Random(seed)
    while True:
        prompt = f"{chr(rng.randrange(65, 91))}{chr(rng.randrange(97, 123))}:"
        moods = (GOOD, BAD) if prompt[0] < "N" else (BAD, GOOD)
        words = [rng.choice(moods[rng.random() > LIKELY]) for _ in range(NUM_WORDS)]
        yield prompt, " " + ", ".join(words) + "."


def pleasant(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The rule: 1 for a text without a bad word, -1 for any other."""
    return [-1.0 if any(word in text for word in BAD) else 1.0 for text in completions]


def open_moods(steps: int = 200, seed: int = 0) -> HFSearch:
    """The trained model as an engine."""
    phase = WarmStart("moods", steps, 0.02, 0.005, sentences)
    recipe = MiniModel((phase,), hidden=64, layers=2, mlp=128, max_positions=64, batch_size=32)
    task = MiniTask("moods", lambda split: rows(26), lambda prompt, text: bool(text), recipe)
    tokenizer = build_tokenizer(recipe.max_positions)
    return HFSearch(warm_start(task, seed, tokenizer), tokenizer)
