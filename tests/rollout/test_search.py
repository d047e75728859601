"""The driver of searches: who is asked what, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import (
    Choose,
    Draw,
    Drawn,
    Rate,
    Request,
    Search,
    answer_all,
    run_searches,
    together,
)

PARAMS = SamplingParams(4)


class Echo:
    """Draws the prompt and the seed, and refuses seed 13; notes what it is asked in one call."""

    tokenizer: Any = None
    eos_ids = frozenset({0})
    limits = Limits(100, 64)

    def __init__(self) -> None:
        self.calls: list[list[Request]] = []

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        self.calls.append(list(requests))
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Any:
        if isinstance(request, Choose):
            return tuple(-float(option) for option in request.options)
        assert isinstance(request, Draw)
        if request.seed == 13:
            return EngineError("an unlucky seed")
        return Drawn((*request.ids, request.seed), (0.0,), "stop")


class Length:
    """Rates a response by its length, one without letters by nothing; notes its calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[Any, str]]] = []

    def rate(self, items: Sequence[tuple[Any, str]]) -> list[float]:
        self.calls.append(list(items))
        return [float(len(text)) or math.nan for _, text in items]


def draws(*seeds: int) -> list[Draw]:
    return [Draw((seed,), PARAMS, seed) for seed in seeds]


def chain(name: int, rounds: int, width: int = 1) -> Search[list[int]]:
    """A search that goes on from what it was told: another reply anywhere changes its result."""
    ids: tuple[int, ...] = (name,)
    for step in range(rounds):
        replies = yield [Draw(ids, PARAMS, 100 * step + i) for i in range(width)]
        ids = tuple(token for drawn in replies for token in drawn.ids)[-5:]
    return [name, *ids]


def alone(search: Search[Any]) -> Any:
    [result] = run_searches(Echo(), [search])
    return result


@given(
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=7),
    in_flight=st.integers(1, 8),
)
def test_a_search_cannot_tell_its_company_and_results_keep_their_order(shapes, in_flight):
    searches = [chain(i, *shape) for i, shape in enumerate(shapes)]
    got = run_searches(Echo(), searches, in_flight=in_flight)
    assert got == [alone(chain(i, *shape)) for i, shape in enumerate(shapes)]


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=7), in_flight=st.integers(1, 8))
def test_a_call_holds_a_round_of_every_search_in_flight_and_the_next_begins_at_an_end(
    lengths, in_flight
):
    engine = Echo()
    run_searches(engine, [chain(i, n) for i, n in enumerate(lengths)], in_flight=in_flight)
    # By hand: places are taken in order, and each holder leaves after as many calls as it has.
    waiting, running, sizes = list(lengths), [], []
    while waiting or running:
        while waiting and len(running) < in_flight:
            running.append(waiting.pop(0))
        sizes.append(len(running))
        running = [left - 1 for left in running if left > 1]
    assert [len(call) for call in engine.calls] == sizes


def test_on_done_is_told_of_each_search_as_it_ends():
    engine, told = Echo(), []
    searches = [chain(0, 3), chain(1, 0), chain(2, 1)]
    results = run_searches(
        engine, searches, on_done=lambda i, r: told.append((i, r, len(engine.calls)))
    )
    assert told == [(1, results[1], 0), (2, results[2], 1), (0, results[0], 3)]


def test_an_error_for_a_reply_is_raised_inside_its_search_alone():
    def careful() -> Search[str]:
        try:
            yield draws(1, 13)
        except EngineError as error:
            [drawn] = yield draws(2)
            return f"{error}, then {drawn.ids}"
        return "nothing was raised"

    def careless() -> Search[str]:
        yield draws(13)
        return "nothing was raised"

    told: list[Any] = []
    got = run_searches(
        Echo(), [careless(), careful(), chain(5, 2)], on_done=lambda i, r: told.append((i, r))
    )
    assert isinstance(got[0], EngineError) and "unlucky" in str(got[0])
    assert got[1] == "an unlucky seed, then (2, 2)"
    assert got[2] == alone(chain(5, 2))
    assert told[0] == (0, got[0])


def test_another_exception_is_nobodys_result():
    def broken() -> Search[None]:
        yield draws(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_searches(Echo(), [broken()])


def test_raters_get_what_all_searches_ask_of_them_in_one_call_and_the_engine_none_of_it():
    engine, first, second = Echo(), Length(), Length()

    def rated(name: str) -> Search[tuple[Any, ...]]:
        replies = yield [
            Rate(first, name, name), *draws(len(name)), Rate(second, name, ""),
            Rate(first, "again", name + "!"),
        ]  # fmt: skip
        return tuple(replies)

    a, b = run_searches(engine, [rated("a"), rated("bb")])
    assert (a[0], a[3], b[0], b[3]) == (1.0, 2.0, 2.0, 3.0)
    assert math.isnan(a[2]) and math.isnan(b[2])
    assert (a[1].ids, b[1].ids) == ((1, 1), (2, 2))
    assert first.calls == [[("a", "a"), ("again", "a!"), ("bb", "bb"), ("again", "bb!")]]
    assert second.calls == [[("a", ""), ("bb", "")]]
    assert engine.calls == [draws(1, 2)]


def test_searches_that_draw_and_rate_stay_in_step():
    """However they began: of n searches that take turns at both, no call draws for a part."""
    engine, rater = Echo(), Length()

    def turns(first: str) -> Search[int]:
        for i in range(4):
            if i or first == "draw":
                yield [Draw((1,), PARAMS, i)]
            yield [Rate(rater, None, "abc")]
        return 4

    assert run_searches(engine, [turns("draw"), turns("rate"), turns("draw")]) == [4, 4, 4]
    assert [len(call) for call in engine.calls] == [3, 3, 3, 2]
    assert sum(map(len, rater.calls)) == 12


def test_an_engine_that_is_asked_nothing_is_not_called():
    engine = Echo()
    assert answer_all(engine, [Rate(Length(), None, "four")]) == [4.0]
    assert answer_all(engine, []) == []
    assert engine.calls == []


def test_a_rater_that_loses_an_item_is_found_out():
    class Lossy(Length):
        def rate(self, items: Sequence[tuple[Any, str]]) -> list[float]:
            return super().rate(items)[1:]

    with pytest.raises(ValueError, match="zip"):
        answer_all(Echo(), [Rate(Lossy(), None, "a"), Rate(Length(), None, "b")])


@given(shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=5))
def test_searches_together_are_asked_as_one_and_come_out_as_alone(shapes):
    engine = Echo()
    [got] = run_searches(engine, [together([chain(i, *s) for i, s in enumerate(shapes)])])
    assert got == [alone(chain(i, *shape)) for i, shape in enumerate(shapes)]
    rounds = max((rounds for rounds, _ in shapes), default=0)
    asked = [sum(width for rounds, width in shapes if rounds > step) for step in range(rounds)]
    assert [len(call) for call in engine.calls] == [count for count in asked if count]


def test_searches_together_nest():
    inner = [together([chain(1, 2), chain(2, 1)]), together([chain(3, 3)])]
    assert alone(together(inner)) == [
        [alone(chain(1, 2)), alone(chain(2, 1))],
        [alone(chain(3, 3))],
    ]


def test_an_error_for_one_of_those_together_ends_them_all():
    def unlucky() -> Search[None]:
        yield draws(13)

    def group() -> Search[str]:
        try:
            yield from together([chain(1, 3), unlucky()])
        except EngineError:
            return "ended"
        return "went on"

    engine = Echo()
    assert run_searches(engine, [group()]) == ["ended"]
    assert len(engine.calls) == 1
