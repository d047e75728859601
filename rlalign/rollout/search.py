"""Searches: decoding methods that ask an engine for several things in turn, many side by side.

A search is a generator. It yields a round of requests, which do not depend on each other, and is
sent their replies. `run_searches` gathers what all searches in flight ask for at the moment into
one call of the engine; since each request has a seed of its own, a search cannot tell whether it is
alone. The rollout server answers the same requests one by one (server/searches.py).

Shapes: N latent positions, D hidden size, K options.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from rlalign.algos.latent import Ascent, LatentState
from rlalign.errors import RlalignError
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.limits import Limits

R = TypeVar("R")
Top = tuple[tuple[int, float], ...]  # tokens with their log-probs, likeliest first


@dataclass(frozen=True, slots=True)
class Draw:
    """Continue `ids`; the reply is a `Drawn`."""

    ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A continuation. `ids` hold the token that ended it, if one did (`finish` is then FINISH_STOP,
    else FINISH_LENGTH); `logp` and `top` are those of the distribution drawn from
    (engine.SamplingParams)."""

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish: str
    top: tuple[Top, ...] = ()


@dataclass(frozen=True, slots=True)
class Choose:
    """Log-probs of the next tokens `options` after `ids`, at temperature 1 over the whole
    vocabulary; the reply is a tuple of K floats."""

    ids: tuple[int, ...]
    options: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Latents:
    """What the language-model head reads to predict tokens `start` to `stop` - 1 of `ids`: the
    reply is float32 [stop - start, D] on the CPU, from one teacher-forced forward pass. `start` is
    at least 1."""

    ids: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Ascend:
    """Take one step of policy-gradient ascent on latents under the engine's own head; the reply is
    an `Ascended`. `tokens_N` are those that were rewarded; `seed` keys what `how` draws."""

    state: LatentState
    tokens_N: Tensor
    reward: float
    how: Ascent
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Ascended:
    """`state` after the step, the tokens of its latents (`Ascent.tokens`), and the likeliest ones
    of the latents before it. `is_still`: the gradient was zero everywhere and nothing moved, so
    nothing will any more."""

    state: LatentState
    tokens_N: Tensor
    before_N: Tensor
    is_still: bool


class Rater(Protocol):
    """Answers about texts without the engine: reward functions, reward models, rules, and
    embedders."""

    def rate(self, items: Sequence[tuple[Any, str]]) -> list[Any]:
        """A score for each (prompt, response), NaN where there is none; an embedder's vectors."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Rate:
    """Score `response` to `prompt`; the reply is a float, or what else the rater gives. Those for
    one rater are scored in one call."""

    rater: Rater
    prompt: Any
    response: str


Request = Draw | Choose | Latents | Ascend | Rate
Reply = Any
Search = Generator[Sequence[Request], list[Reply], R]


class SearchEngine(Protocol):
    """A language model that answers the requests of searches. Every one passes
    tests/rollout/search_conformance.py."""

    tokenizer: Any
    eos_ids: frozenset[int]

    @property
    def limits(self) -> Limits:
        """Size of the vocabulary and the longest sequence."""
        ...

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply for each request (there is no `Rate` among them), in order. A request that
        cannot be served, or whose logits are not finite, gets an EngineError as its reply, and the
        others their own replies; what concerns all of them is raised."""
        ...


def run_searches(
    engine: SearchEngine,
    searches: Sequence[Search[R]],
    *,
    in_flight: int = 64,
    on_done: Callable[[int, R | RlalignError], None] | None = None,
) -> list[R | RlalignError]:
    """What each search returned, in order, or the error that ended it. At most `in_flight` run side
    by side; the next one begins when one has ended. `on_done` is told of each as it ends: its place
    and its result."""
    results: dict[int, R | RlalignError] = {}
    waiting = iter(range(len(searches)))
    pending: dict[int, Sequence[Request]] = {}

    def advance(index: int, step: Callable[[], Sequence[Request]]) -> None:
        try:
            pending[index] = step()
            return
        except StopIteration as stop:
            results[index] = stop.value
        except RlalignError as error:
            results[index] = error
        if on_done is not None:
            on_done(index, results[index])

    while True:
        while len(pending) < in_flight and (index := next(waiting, None)) is not None:
            advance(index, lambda i=index: next(searches[i]))
        if not pending:
            return [results[index] for index in range(len(searches))]
        rounds = _next_rounds(pending)
        pending = {index: pending[index] for index in pending if index not in rounds}
        replies = iter(answer_all(engine, [r for requests in rounds.values() for r in requests]))
        for index, requests in rounds.items():
            own = [next(replies) for _ in requests]
            advance(index, lambda s=searches[index], own=own: resume(s, own))


def _next_rounds(pending: dict[int, Sequence[Request]]) -> dict[int, Sequence[Request]]:
    """Steps on latents come first, since many of them change no token, and ratings before anything
    that the model reads or draws: searches fall into step, and what they draw is one call."""
    for kind in (Ascend, Rate):
        first = {
            index: requests
            for index, requests in pending.items()
            if all(isinstance(request, kind) for request in requests)
        }
        if first:
            return first
    return dict(pending)


def together(searches: Sequence[Search[R]]) -> Search[list[R]]:
    """One search of several that do not depend on each other: their rounds are asked as one."""
    results: dict[int, R] = {}
    pending: dict[int, Sequence[Request]] = {}

    def advance(index: int, step: Callable[[], Sequence[Request]]) -> None:
        try:
            pending[index] = step()
        except StopIteration as stop:
            results[index] = stop.value

    for index, search in enumerate(searches):
        advance(index, lambda s=search: next(s))
    while pending:
        rounds, pending = pending, {}
        replies = iter((yield [r for requests in rounds.values() for r in requests]))
        for index, requests in rounds.items():
            own = [next(replies) for _ in requests]
            advance(index, lambda s=searches[index], own=own: resume(s, own))
    return [results[index] for index in range(len(searches))]


def resume(search: Search[Any], replies: list[Reply]) -> Sequence[Request]:
    """The next round of a search that is given `replies`; the first error among them is raised
    inside it."""
    for reply in replies:
        if isinstance(reply, RlalignError):
            return search.throw(reply)
    return search.send(replies)


def answer_all(engine: SearchEngine, requests: Sequence[Request]) -> list[Reply]:
    """The replies of the engine, and of raters, in order."""
    replies: dict[int, Reply] = {}
    asked = [i for i, request in enumerate(requests) if not isinstance(request, Rate)]
    if asked:
        replies.update(zip(asked, engine.answer([requests[i] for i in asked]), strict=True))
    for rater, index in by_rater(requests):
        rates = [requests[i] for i in index]
        items = [(rate.prompt, rate.response) for rate in rates if isinstance(rate, Rate)]
        replies.update(zip(index, rater.rate(items), strict=True))
    return [replies[i] for i in range(len(requests))]


def by_rater(requests: Sequence[Request]) -> Iterator[tuple[Rater, list[int]]]:
    """Each rater that is asked, and where."""
    found: dict[int, tuple[Rater, list[int]]] = {}
    for i, request in enumerate(requests):
        if isinstance(request, Rate):
            found.setdefault(id(request.rater), (request.rater, []))[1].append(i)
    yield from found.values()
