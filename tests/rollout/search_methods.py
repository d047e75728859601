"""Methods for servers in tests: each is a generator, under a name of the test's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Draw, Rate, Search
from rlalign.rollout.server.methods import Asked, Found, Progress, ServedModel

Begin = Callable[[ServedModel, Asked, Progress], Search[Found]]


class Stubs:
    """`Methods` of the test; `closed` tells which searches ended before they found anything."""

    def __init__(self, **methods: Begin) -> None:
        self._methods = methods
        self.asked: list[Asked] = []
        self.closed: list[str] = []

    def names(self) -> list[str]:
        return [*self._methods]

    def knows(self, name: str) -> bool:
        return name in self._methods

    def begin(
        self, name: str, model: ServedModel, asked: Asked, progress: Progress
    ) -> Search[Found]:
        self.asked.append(asked)
        return self._watched(name, self._methods[name](model, asked, progress))

    def _watched(self, name: str, search: Search[Found]) -> Search[Found]:
        try:
            return (yield from search)
        except GeneratorExit:
            self.closed.append(name)
            raise

    def close(self) -> None: ...


class Lengths:
    """A rater: the number of characters. `calls` are the sizes of what it was given at a time."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def rate(self, items: Sequence[tuple[Any, str]]) -> list[float]:
        self.calls.append(len(items))
        return [float(len(text)) for _, text in items]


def draw(asked: Asked, seed: int = 0, length: int = 4) -> Draw:
    return Draw(asked.ids, SamplingParams(length), seed)


def found(text: str = "found", tokens: int = 1, generated: int = 5, **account: Any) -> Found:
    return Found(text, tokens, "stop", generated, account)


def rounds(*sizes: int, rater: Any = None) -> Begin:
    """A method that draws so many sequences in each of its rounds, and rates as many texts."""

    def begin(model: ServedModel, asked: Asked, progress: Progress) -> Search[Found]:
        generated, scores = 0, []
        for number, size in enumerate(sizes):
            draws = [draw(asked, seed=100 * number + i) for i in range(size)]
            rates = [] if rater is None else [Rate(rater, None, "a" * i) for i in range(size)]
            replies = yield [*rates, *draws]
            for score in replies[: len(rates)]:
                progress.scored(score)
                scores.append(score)
            generated += sum(len(reply.ids) for reply in replies[len(rates) :])
        return found(generated=generated, scores=scores)

    return begin


def variety(prompts: list[Any], completions: list[str]) -> list[float]:
    """A reward: the share of a text's characters that are different ones."""
    return [len(set(text)) / max(1, len(text)) for text in completions]
