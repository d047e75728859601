"""The built-in mini task: chains of additions and subtractions, solved one step at a time.

A question has 2 to 5 terms: the first is 0..99, the others 1..9, and every running value stays
within 0..99. Difficulty grows with the number of terms, and an answer is right or wrong, so a group
of samples of one question often holds both: what every method here needs to learn from.

    prompt      84-9+8=?
    completion  <think>84-9=75
                75+8=83</think><answer>83</answer>

Everything is a function of a seed. One question in ten, chosen by a hash of its text, is held out:
no training row and no demonstration ever shows it, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlalign.tasks.errors import TaskError
from rlalign.tasks.mini import MiniModel, MiniTask, WarmStart

MIN_TERMS, MAX_TERMS = 2, 5
LIMIT = 99  # largest running value


@dataclass(frozen=True, slots=True)
class Chain:
    """`start` and the signed terms that follow.

    >>> Chain(84, (-9, 8)).prompt, Chain(84, (-9, 8)).values
    ('84-9+8=?', (84, 75, 83))
    """

    start: int
    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"{self.start}" + "".join(f"{term:+d}" for term in self.terms) + "=?"

    @property
    def values(self) -> tuple[int, ...]:
        """The running values, start and result included."""
        return running_values(self.start, self.terms)

    @property
    def answer(self) -> str:
        return str(self.values[-1])


@dataclass(frozen=True)
class Mistakes:
    """How a demonstrator errs: probabilities per step, and of writing no steps at all.

    A forgotten carry (or borrow) is systematic: 75+8=73, 84-9=85. A slip is off by one. Both leave
    the rest of the chain right, as a person's would. Without steps the answer is the true
    one, which teaches to guess.
    """

    carry: float = 0.0
    slip: float = 0.0
    skip: float = 0.0


def running_values(start: int, terms: tuple[int, ...]) -> tuple[int, ...]:
    values = [start]
    for term in terms:
        values.append(values[-1] + term)
    return tuple(values)


def draw_chain(rng: random.Random, num_terms: int) -> Chain:
    """A chain of `num_terms` terms, start included, whose running values stay within 0..99."""
    start = value = rng.randrange(LIMIT + 1)
    terms: list[int] = []
    for _ in range(num_terms - 1):
        size = rng.randint(1, 9)
        signs = [sign for sign in (1, -1) if 0 <= value + sign * size <= LIMIT]
        terms.append(rng.choice(signs) * size)
        value += terms[-1]
    return Chain(start, tuple(terms))


def held_out(prompt: str) -> bool:
    """Whether a question belongs to the evaluation split: one in ten, by a hash of its text."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % 10 == 0


def chains(
    split: str, seed: int, min_terms: int = MIN_TERMS, max_terms: int = MAX_TERMS
) -> Iterator[Chain]:
    """Endless chains of one split ("train" or "eval"), every number of terms equally likely."""
    rng = random.Random(f"chain/{split}/{seed}")
    while True:
        chain = draw_chain(rng, rng.randint(min_terms, max_terms))
        if held_out(chain.prompt) == (split == "eval"):
            yield chain


def make_rows(
    split: str,
    *,
    size: int | None = None,
    seed: int = 0,
    min_terms: int = MIN_TERMS,
    max_terms: int = MAX_TERMS,
) -> list[dict[str, Any]]:
    """`size` rows (10,000 for train, 500 for eval) with different questions; a smaller size is a
    prefix of a larger one.

    >>> make_rows("train", size=1)[0].keys()
    dict_keys(['prompt', 'answer', 'num_terms'])
    """
    size = size if size is not None else {"train": 10_000, "eval": 500}[split]
    if not 1 <= size <= 200_000 or not MIN_TERMS <= min_terms <= max_terms <= MAX_TERMS:
        raise TaskError(
            f"mini:chain got size={size}, min_terms={min_terms}, max_terms={max_terms}; "
            f"size is 1..200000 and {MIN_TERMS} <= min_terms <= max_terms <= {MAX_TERMS}"
        )
    seen: dict[str, Chain] = {}
    repeats = 0
    for chain in chains(split, seed, min_terms, max_terms):
        repeats = repeats + 1 if chain.prompt in seen else 0
        if repeats > 1000:
            raise TaskError(
                f"mini:chain has only about {len(seen)} different {split} questions of {min_terms} "
                f"to {max_terms} terms; lower size={size} or raise max_terms"
            )
        seen[chain.prompt] = chain
        if len(seen) == size:
            break
    return [
        {"prompt": chain.prompt, "answer": chain.answer, "num_terms": len(chain.terms) + 1}
        for chain in seen.values()
    ]


def demonstrate(chain: Chain, rng: random.Random, mistakes: Mistakes = Mistakes()) -> str:
    """The completion a demonstrator writes: the right one when `mistakes` are all 0."""
    if rng.random() < mistakes.skip:
        return f"<think></think><answer>{chain.answer}</answer>"
    value, lines = chain.start, []
    for i, term in enumerate(chain.terms):
        wrong = _erred(value, term, rng, mistakes)
        result = wrong if _stays_in_range(wrong, chain.terms[i + 1 :]) else value + term
        lines.append(f"{value}{term:+d}={result}")
        value = result
    steps = "\n".join(lines)
    return f"<think>{steps}</think><answer>{value}</answer>"


def demonstrations(seed: int, phase: str, mistakes: Mistakes) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs on questions that are not held out."""
    rng = random.Random(f"chain/demonstrations/{phase}/{seed}")
    for chain in chains("train", rng.getrandbits(32)):
        yield chain.prompt, demonstrate(chain, rng, mistakes)


def check_completion(prompt: str, completion: str) -> bool:
    """Whether the completion's answer tag holds the value of the question."""
    found = re.search(r"<answer>(-?\d+)</answer>", completion)
    start, *terms = (int(term) for term in re.findall(r"[+-]?\d+", prompt))
    return found is not None and int(found.group(1)) == running_values(start, tuple(terms))[-1]


def _erred(value: int, term: int, rng: random.Random, mistakes: Mistakes) -> int:
    right = value + term
    carries = right // 10 != value // 10
    if carries and rng.random() < mistakes.carry:
        return right - 10 if term > 0 else right + 10
    if rng.random() < mistakes.slip:
        return right + rng.choice((-1, 1))
    return right


def _stays_in_range(value: int, terms: tuple[int, ...]) -> bool:
    return all(0 <= later <= LIMIT for later in running_values(value, terms))


def _plain(seed: int) -> Iterator[tuple[str, str]]:
    return demonstrations(seed, "plain", Mistakes())


def _mistaken(seed: int) -> Iterator[tuple[str, str]]:
    return demonstrations(seed, "mistaken", Mistakes(carry=0.6, slip=0.05, skip=0.15))


TASK = MiniTask(
    name="chain",
    make_rows=make_rows,
    is_correct=check_completion,
    model=MiniModel(
        phases=(
            WarmStart("plain demonstrations", 480, 6e-3, 1e-2, _plain),
            WarmStart("mistaken demonstrations", 60, 1.2e-3, 6e-4, _mistaken),
        )
    ),
)
