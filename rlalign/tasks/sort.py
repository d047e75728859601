"""`mini:sort6`, `mini:sort16`: write digits in ascending order, for a diffusion language model.

The prompt is six (or sixteen) digits from 0 to 7 and an equals sign, the completion the same digits
sorted. Every place of the answer depends on the whole prompt and on every other place, so what is
filled in parallel must agree. A model that knows positions by distance only (rotary) finds its
place by the equals sign.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

from rlalign.tasks.mini import MaskedMiniTask, MaskedTraining

DIGITS = "01234567"
CORRUPTED = 0.7  # of the demonstrations; one or two places of the answer are replaced
EVAL_SIZE = 200


def make_rows(
    split: str, size: int = 2000, seed: int = 0, *, num_digits: int = 6
) -> list[dict[str, Any]]:
    """`size` rows (200 at most for "eval"), keyed by `seed`; no question of "eval" is in "train".

    >>> make_rows("train", size=1)  # doctest: +SKIP
    [{'prompt': '417250=', 'answer': '012457'}]
    """
    rng = random.Random(f"sort{num_digits}/{seed}" if split == "train" else "sort/eval")
    if split != "train":
        size = min(size, EVAL_SIZE)
    rows: list[dict[str, Any]] = []
    while len(rows) < size:
        question = _question(rng, num_digits)
        if is_held_out(question) == (split != "train"):
            rows.append({"prompt": f"{question}=", "answer": solve(question)})
    return rows


def solve(question: str) -> str:
    return "".join(sorted(question))


def is_held_out(question: str) -> bool:
    """One question in eight, by the digits themselves."""
    return sum(int(digit) * (i + 3) for i, digit in enumerate(question)) % 8 == 0


def is_correct(prompt: str, completion: str) -> bool:
    return completion == solve(prompt.removesuffix("="))


def demonstrations(seed: int, num_digits: int) -> Iterator[tuple[str, str]]:
    """Questions with answers of which most are wrong in one or two places, without end."""
    rng = random.Random(f"sort{num_digits}/demonstrations/{seed}")
    while True:
        question = _question(rng, num_digits)
        if is_held_out(question):
            continue
        answer = list(solve(question))
        if rng.random() < CORRUPTED:
            for place in rng.sample(range(num_digits), rng.choice((1, 2))):
                answer[place] = rng.choice(DIGITS)
        yield f"{question}=", "".join(answer)


def _question(rng: random.Random, num_digits: int) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(num_digits))


def _task(num_digits: int) -> MaskedMiniTask:
    shown = functools.partial(demonstrations, num_digits=num_digits)
    return MaskedMiniTask(
        f"sort{num_digits}",
        functools.partial(make_rows, num_digits=num_digits),
        is_correct,
        MaskedTraining(num_digits, DIGITS + "=", shown),
    )


SORT6, SORT16 = _task(6), _task(16)
