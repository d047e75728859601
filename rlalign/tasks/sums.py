"""`mini:sums`: running sums modulo ten, for a diffusion language model.

The prompt is eight digits and an equals sign, the completion eight steps `+d=s` of four letters
each: the next digit, and the sum so far modulo ten. Every sum builds on the one before, 32 tokens
long, so an estimate of a completion's log-prob that rests on one mask is a poor one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from rlalign.tasks.mini import MaskedMiniTask, MaskedTraining

NUM_STEPS, DIGITS = 8, "0123456789"
SLIP = 0.1  # of the demonstrations' sums; what follows builds on the wrong one
EVAL_SIZE = 200
STEP = re.compile(r"\+(\d)=(\d)")


def make_rows(split: str, size: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """`size` rows (200 at most for "eval"), keyed by `seed`; no question of "eval" is in "train".

    >>> make_rows("train", size=1)  # doctest: +SKIP
    [{'prompt': '34812076=', 'answer': '+3=3+4=7+8=5+1=6+2=8+0=8+7=5+6=1'}]
    """
    rng = random.Random(f"sums/{seed}" if split == "train" else "sums/eval")
    if split != "train":
        size = min(size, EVAL_SIZE)
    rows: list[dict[str, Any]] = []
    while len(rows) < size:
        question = _question(rng)
        if is_held_out(question) == (split != "train"):
            rows.append({"prompt": f"{question}=", "answer": solve(question)})
    return rows


def solve(question: str, slip: Iterator[int] | None = None) -> str:
    """The steps, with `slip` added to each sum modulo ten (None: none)."""
    total, steps = 0, []
    for digit in question:
        total = (total + int(digit) + (next(slip) if slip else 0)) % 10
        steps.append(f"+{digit}={total}")
    return "".join(steps)


def is_held_out(question: str) -> bool:
    """One question in eight, by the digits themselves."""
    return sum(int(digit) * (2 * i + 1) for i, digit in enumerate(question)) % 8 == 0


def is_correct(prompt: str, completion: str) -> bool:
    return completion == solve(prompt.removesuffix("="))


def demonstrations(seed: int) -> Iterator[tuple[str, str]]:
    """Questions with answers in which one sum in ten is wrong, without end."""
    rng = random.Random(f"sums/demonstrations/{seed}")
    slips = (rng.randrange(1, 10) if rng.random() < SLIP else 0 for _ in iter(int, 1))
    while True:
        question = _question(rng)
        if not is_held_out(question):
            yield f"{question}=", solve(question, slips)


def steps_right(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of steps that have the right digit and follow from the one before."""
    pairs = zip(completions, prompts, strict=True)
    return [_share(text, prompt.removesuffix("=")) for text, prompt in pairs]


def _share(text: str, question: str) -> float:
    right, before = 0, 0
    for i, digit in enumerate(question):
        step = STEP.fullmatch(text[4 * i : 4 * i + 4])
        if step is None:
            return right / NUM_STEPS
        now = int(step[2])
        right += step[1] == digit and now == (before + int(digit)) % 10
        before = now
    return right / NUM_STEPS


def _question(rng: random.Random) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(NUM_STEPS))


TASK = MaskedMiniTask(
    "sums",
    make_rows,
    is_correct,
    MaskedTraining(4 * NUM_STEPS, DIGITS + "+=", demonstrations, steps=2000, batch_size=64),
)
