"""One search for each prompt, side by side: what the public functions stand on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from rlalign.config.load import parse
from rlalign.errors import RlalignError
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Request, Search, SearchEngine, run_searches
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Given, Prompt, make_prompt, prompt_id
from rlalign.testtime.result import Result, failed_result

T = TypeVar("T")
IN_FLIGHT = 64


def settings(kind: type[T], config: T | None, options: dict[str, Any]) -> T:
    """`config`, or one of `kind` from keyword arguments, of which sections are mappings or configs
    of their own; both at once is refused. Raises ConfigError for unknown options and values out of
    range."""
    if config is not None and options:
        raise DecodeError(f"give a config or options, not both: {', '.join(options)}")
    if config is not None:
        return config
    return parse(kind, {name: _plain(value) for name, value in options.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def run_each(
    engine: SearchEngine,
    prompts: Sequence[Given],
    search: Callable[[Prompt], Search[Result]],
    *,
    chat: bool | None = None,
    system: str = "",
    in_flight: int = IN_FLIGHT,
    on_done: Callable[[int, Result], None] | None = None,
) -> list[Result]:
    """The result of a search for each prompt, in order. A prompt that cannot be served gives a
    result with `error`, and the others their own."""
    if isinstance(prompts, str | Mapping):
        raise DecodeError("prompts is a single one: give a list of prompts")
    if in_flight < 1:
        raise DecodeError(f"in_flight={in_flight}: at least 1 search must run")
    results: dict[int, Result] = {}

    def finish(index: int, result: Result) -> None:
        results[index] = result
        if on_done is not None:
            on_done(index, result)

    ready: list[tuple[int, Prompt]] = []
    for index, given in enumerate(prompts):
        try:
            prompt = make_prompt(engine.tokenizer, given, index, chat=chat, system=system)
            _check_known(prompt, engine.limits.vocab)
            ready.append((index, prompt))
        except RlalignError as error:
            finish(index, failed_result(Prompt(prompt_id(given, index), (), ""), error))

    def done(place: int, result: Result | RlalignError) -> None:
        index, prompt = ready[place]
        good = isinstance(result, Result)
        finish(index, result if good else failed_result(prompt, result, ledgers[place]))

    ledgers = [Ledger() for _ in ready]
    searches = [
        _entered(search(prompt), ledger) for (_, prompt), ledger in zip(ready, ledgers, strict=True)
    ]
    run_searches(engine, searches, in_flight=in_flight, on_done=done)
    return [results[index] for index in range(len(prompts))]


def _entered(search: Search[Result], ledger: Ledger) -> Search[Result]:
    """`search`, with an account that outlives an error in it."""
    step: Callable[[], Sequence[Request]] = partial(next, search)
    while True:
        try:
            requests = step()
        except StopIteration as stop:
            return stop.value
        try:
            replies = yield from ledger.ask(requests)
        except RlalignError as error:
            step = partial(search.throw, error)
        else:
            step = partial(search.send, replies)


def _check_known(prompt: Prompt, vocab: int) -> None:
    if prompt.ids and not 0 <= min(prompt.ids) <= max(prompt.ids) < vocab:
        raise DecodeError(
            f"prompt {prompt.id!r} has token ids from {min(prompt.ids)} to {max(prompt.ids)}; the "
            f"model knows 0 to {vocab - 1}: give ids of its own tokenizer, or the text"
        )


def longest(engine: SearchEngine, ids: Sequence[int], wanted: int) -> int:
    """How many tokens may follow `ids`: `wanted`, or what the context leaves. Raises DecodeError
    where it leaves none."""
    left = engine.limits.max_len - len(ids)
    if left < 1:
        raise DecodeError(
            f"the prompt has {len(ids)} tokens and the model's context {engine.limits.max_len}: "
            "no token can follow"
        )
    return min(wanted, left)


def greedy(num_tokens: int) -> SamplingParams:
    """At temperature 0."""
    return SamplingParams(num_tokens, temperature=0.0)


def new_ledger(config: Any) -> Ledger:
    """An account with the budgets of a `SearchConfig`."""
    return Ledger(max_tokens=config.max_tokens, max_wall_s=config.max_wall_s)
