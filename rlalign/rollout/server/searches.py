"""Searches on the server's engine: what each yields becomes sequences in the queue of its job.

A search runs Python, which may tokenize or score, so it never runs on the event loop: all are
advanced on one thread, and raters have threads of their own. A search that nobody waits for any
more is closed, and what it has in the engine aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from rlalign.errors import RlalignError
from rlalign.rollout.engine import EngineError
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Rate, Rater, Reply, Request, Search, by_rater, resume
from rlalign.rollout.server.answers import STATUS
from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.engine_process import EngineLost
from rlalign.rollout.server.methods import Found, Progress, ServedModel
from rlalign.rollout.server.quotas import TooMany
from rlalign.rollout.server.search_messages import message_of, reply_of
from rlalign.rollout.server.sequences import Refused
from rlalign.rollout.server.sequences import Sequence as Running
from rlalign.rollout.server.streams import outcome
from rlalign.rollout.server.texts import load_tokenizer

T = TypeVar("T")
MAX_RATINGS = 4  # at a time, each of another rater
ROOM_S = 60.0  # that a search which has begun waits for room in its job's queue
LOOK_S = 0.05  # between two looks for it


@dataclass(frozen=True)
class Round:
    """What a search asks for: `messages` for the engine with their costs, by place."""

    requests: Sequence[Request]
    messages: dict[int, tuple[dict[str, Any], int]]
    refused: dict[int, EngineError]


@dataclass(frozen=True)
class Lease:
    """In whose name a search runs; `check` raises where the job is over."""

    job: str
    check: Callable[[], Any]


class Searches:
    """`model` is the folder of the served model; close it in the end."""

    def __init__(self, host: EngineHost, model: str) -> None:
        self._host = host
        self._thread = ThreadPoolExecutor(1, "searches")
        self._raters = ThreadPoolExecutor(MAX_RATINGS, "raters")
        # By rater, which scores one batch at a time; each lives as long as somebody wants it.
        self._rating: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._folder, self._tokenizer = model, None
        self.running = 0

    async def run(
        self,
        lease: Lease,
        begin: Callable[[ServedModel], Search[Found]],
        progress: Progress,
        admitted: asyncio.Event,
    ) -> Found:
        """What a search finds. `admitted` is set when its first round is in the queue.

        Raises TooMany where that has no room, Refused for what the method cannot do, and what a
        plain request would get.
        """
        self.running += 1
        try:
            search = await self._on_thread(self._thread, lambda: begin(self._model()))
            try:
                return await self._drive(lease, search, progress, admitted)
            finally:
                with contextlib.suppress(RuntimeError):  # the thread is gone, as the server closes
                    self._thread.submit(search.close)  # after the step that may run just now
        except tuple(STATUS):
            raise
        except RlalignError as error:
            raise Refused(str(error)) from error
        finally:
            self.running -= 1

    def close(self) -> None:
        for pool in (self._thread, self._raters):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _drive(
        self, lease: Lease, search: Search[Found], progress: Progress, admitted: asyncio.Event
    ) -> Found:
        asked = await self._on_thread(self._thread, lambda: self._first(search))
        while isinstance(asked, Round):
            sequences = await self._submit(lease, asked, is_first=not admitted.is_set())
            admitted.set()
            try:
                rates = await self._answered(asked, sequences, progress)
                done = {i: _outcome(s, progress) for i, s in sequences.items()}
            finally:
                self._host.cancel(sequences.values())
            progress.rounds += 1
            asked = await self._on_thread(
                self._thread, lambda a=asked, d=done, r=rates: self._next(search, a, d, r)
            )
        return asked

    # --- on the thread ---------------------------------------------------------------------------

    def _model(self) -> ServedModel:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        return ServedModel(self._tokenizer, frozenset(self._host.limits["eos_ids"]), self._limits())

    def _limits(self) -> Limits:
        return Limits(self._host.limits["vocab"], self._host.limits["max_len"])

    def _first(self, search: Search[Found]) -> Round | Found:
        return self._advanced(lambda: next(search))

    def _next(
        self,
        search: Search[Found],
        asked: Round,
        done: dict[int, dict[str, Any] | EngineError],
        rates: dict[int, float],
    ) -> Round | Found:
        known: dict[int, Reply] = {**asked.refused, **rates}
        for i, said in done.items():
            failed = isinstance(said, EngineError)
            known[i] = said if failed else reply_of(asked.requests[i], said)
        return self._advanced(lambda: resume(search, [known[i] for i in range(len(known))]))

    def _advanced(self, step: Callable[[], Sequence[Request]]) -> Round | Found:
        """The next round, or the end."""
        try:
            requests = step()
        except StopIteration as stop:
            return stop.value
        limits, messages, refused = self._limits(), {}, {}
        for i, request in enumerate(requests):
            try:
                if not isinstance(request, Rate):
                    messages[i] = message_of(request, limits)
            except EngineError as error:
                refused[i] = error
        return Round(requests, messages, refused)

    # --- on the event loop -----------------------------------------------------------------------

    async def _submit(self, lease: Lease, asked: Round, *, is_first: bool) -> dict[int, Running]:
        """A round in the queue. The first is refused as any request where the job has no room; a
        search that has begun waits for it."""
        wishes, loop = list(asked.messages.values()), asyncio.get_running_loop()
        deadline = loop.time() + ROOM_S
        most = self._host.quotas.max_queued
        while True:
            lease.check()
            try:
                running = self._host.submit(lease.job, wishes)
                return dict(zip(asked.messages, running, strict=True))
            except TooMany:
                never = most is not None and len(wishes) > most
                if is_first or never or loop.time() > deadline:
                    raise
            await asyncio.sleep(LOOK_S)

    async def _answered(
        self, asked: Round, sequences: dict[int, Running], progress: Progress
    ) -> dict[int, float]:
        """Wait for the round; the raters' replies."""

        def count(result: asyncio.Future[dict[str, Any]]) -> None:
            if not result.cancelled() and result.exception() is None:
                progress.num_generated_tokens += len(result.result().get("ids", ()))

        for sequence in sequences.values():
            sequence.result.add_done_callback(count)
        rating = [
            asyncio.create_task(self._rate(rater, index, asked.requests))
            for rater, index in by_rater(asked.requests)
        ]
        try:
            waiting = [s.result for s in sequences.values()]
            if waiting:
                await asyncio.wait(waiting)
            rates = await asyncio.gather(*rating)
        finally:
            for task in rating:
                task.cancel()
        return {i: rate for part in rates for i, rate in part.items()}

    async def _rate(
        self, rater: Rater, index: list[int], requests: Sequence[Request]
    ) -> dict[int, float]:
        items = [
            (r.prompt, r.response) for r in (requests[i] for i in index) if isinstance(r, Rate)
        ]
        lock = self._rating.setdefault(id(rater), asyncio.Lock())
        async with lock:
            rates = await self._on_thread(self._raters, lambda: rater.rate(items))
        return dict(zip(index, rates, strict=True))

    async def _on_thread(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _outcome(sequence: Running, progress: Progress) -> dict[str, Any] | EngineError:
    """What the engine said, also if it refused this one; raises what concerns the whole search."""
    try:
        done = outcome(sequence)
    except Refused as error:
        return EngineError(str(error))
    if done.get("finish") == "abort":
        raise EngineLost("the job's weights were updated with in_flight=abort: ask again")
    progress.versions.update(version for _, version in done.get("spans", ()))
    return done
