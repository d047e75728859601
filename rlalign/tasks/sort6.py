"""`mini:sort6`: write six digits in ascending order, for a diffusion language model.

The prompt is six digits from 0 to 7, the completion the same six sorted. Every place of the answer
depends on the whole prompt and on every other place, so what is filled in parallel must agree.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from rlalign.tasks.mini import MaskedMiniTask, MaskedTraining

NUM_DIGITS, DIGITS = 6, "01234567"
CORRUPTED = 0.7  # of the demonstrations; one or two places of the answer are replaced
EVAL_SIZE = 200


def make_rows(split: str, size: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """`size` rows (200 at most for "eval"), keyed by `seed`; no question of "eval" is in "train".

    >>> make_rows("train", size=1)  # doctest: +SKIP
    [{'prompt': '417250', 'answer': '012457'}]
    """
    rng = random.Random(f"sort6/{seed}" if split == "train" else "sort6/eval")
    if split != "train":
        size = min(size, EVAL_SIZE)
    rows: list[dict[str, Any]] = []
    while len(rows) < size:
        question = _question(rng)
        if is_held_out(question) == (split != "train"):
            rows.append({"prompt": question, "answer": solve(question)})
    return rows


def solve(question: str) -> str:
    return "".join(sorted(question))


def is_held_out(question: str) -> bool:
    """One question in eight, by the digits themselves."""
    return sum(int(digit) * (i + 3) for i, digit in enumerate(question)) % 8 == 0


def is_correct(question: str, completion: str) -> bool:
    return completion == solve(question)


def demonstrations(seed: int) -> Iterator[tuple[str, str]]:
    """Questions with answers of which most are wrong in one or two places, without end."""
    rng = random.Random(f"sort6/demonstrations/{seed}")
    while True:
        question = _question(rng)
        if is_held_out(question):
            continue
        answer = list(solve(question))
        if rng.random() < CORRUPTED:
            for place in rng.sample(range(NUM_DIGITS), rng.choice((1, 2))):
                answer[place] = rng.choice(DIGITS)
        yield question, "".join(answer)


def _question(rng: random.Random) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(NUM_DIGITS))


TASK = MaskedMiniTask(
    "sort6",
    make_rows,
    is_correct,
    MaskedTraining(NUM_DIGITS, DIGITS, demonstrations),
)
