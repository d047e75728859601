"""The server's side of its engine: sequences in flight, and weight updates between them.

A sequence that was in flight when the engine died was never answered, so it runs again, from its
own seed: the last update is replayed, and its digest must come out the same. If another update was
waiting for it, it runs under that one, and its version says so. A sequence that was there each time
the engine died is given up in the end. Weights that came without files cannot be replayed: whoever
wants something under them is told that they are lost, until they are sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

from rlalign.rollout.engine import WeightsLost
from rlalign.rollout.server.engine_keeper import MAX_RESTARTS, EngineKeeper
from rlalign.rollout.server.engine_process import EngineLost
from rlalign.rollout.server.fair import FairQueue
from rlalign.rollout.server.quotas import Quotas
from rlalign.rollout.server.sequences import Counters, Refused, Sequence, Tally, Update

MAX_ATTEMPTS = MAX_RESTARTS  # of one sequence: one that kills goes before the engine does
STALL_S = 120.0
UPDATE_TIMEOUT_S = 300.0
OTHERWISE = (
    "the engine died, and what it had drawn and told came out otherwise the second time: the "
    "weights are others by now; ask again"
)
NOT_BEGUN = {"ids": [], "logp": [], "spans": [], "finish": "abort"}  # of a draw, when it is aborted


class EngineHost:
    """One engine and what is in flight in it.

    `setup` is what engine_main.start takes; at most `slots` sequences are in the process at a time,
    the others wait here, where jobs take turns. All methods belong to one event loop.
    """

    def __init__(
        self,
        setup: dict[str, Any],
        *,
        slots: int,
        start_timeout_s: float,
        quotas: Quotas,
        stall_s: float = STALL_S,
    ) -> None:
        self._slots, self.quotas = slots, quotas
        self.keeper = EngineKeeper(setup, self, start_timeout_s=start_timeout_s, stall_s=stall_s)
        self.queue: FairQueue[Sequence] = FairQueue()
        self.counters = Counters()
        self.update: Update | None = None  # None: the model folder's own weights
        self.adapters: dict[str, Update] = {}  # by job
        self._lost = ""  # why the engine has other weights than it was sent
        self._in_flight: dict[int, Sequence] = {}
        self.next_number = 0  # of a sequence that goes to the engine
        self._holds = 0  # above 0: nothing new goes to the engine
        self._drained = asyncio.Event()
        self._answer: asyncio.Future[dict[str, Any]] | None = None  # of an update
        self._updating = asyncio.Lock()

    async def start(self) -> None:
        """Raises EngineLost with the engine's own words where it cannot start."""
        await self.keeper.start()

    async def close(self) -> None:
        await self.keeper.close()

    @property
    def alive(self) -> bool:
        return self.keeper.alive

    @property
    def failure(self) -> str:
        """Why there is no engine, for good."""
        return self.keeper.failure

    @property
    def lost(self) -> str:
        """Why the engine has other weights than it was sent; empty where it has not."""
        return self._lost

    @property
    def limits(self) -> dict[str, Any]:
        return self.keeper.limits

    # --- sequences -------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def load(self, job: str) -> tuple[int, int]:
        """How many sequences of a job wait, and how many are in the engine."""
        return self.queue.waiting(job), sum(s.job == job for s in self._in_flight.values())

    def submit(self, job: str, wishes: list[tuple[dict[str, Any], int]]) -> list[Sequence]:
        """Queue a sequence for each message and the tokens it may cost. Its result comes through
        `Sequence.result`: the engine's `done` message, Refused, EngineLost or WeightsLost. Raises
        TooMany, and queues none."""
        if self.failure:
            raise EngineLost(self.failure)
        if self._lost:
            raise WeightsLost(self._lost)
        self.quotas.admit(sum(self.load(job)), len(wishes))
        result = asyncio.get_running_loop().create_future
        sequences = [Sequence(job, message, tokens, result()) for message, tokens in wishes]
        for sequence in sequences:
            # A score tells whether new weights are in use: a batch that is drawn can wait for it.
            first = sequence.message["kind"] == "score"
            self.queue.push(job, sequence, sequence.tokens, first=first)
        self._pump()
        return sequences

    def oldest(self, job: str) -> int:
        """The number of the job's oldest sequence in the engine, or of the next one."""
        mine = (number for number, s in self._in_flight.items() if s.job == job)
        return min(mine, default=self.next_number)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Forget sequences nobody waits for any more. What was told of them counts as drawn."""
        running, queued = [], set()
        for sequence in sequences:
            if sequence.result.done() and not sequence.result.cancelled():
                sequence.result.exception()  # seen: nobody else will ask
                continue
            if sequence.result.cancel() and sequence.ids:
                self._count(sequence.job, len(sequence.ids))
            if self._in_flight.pop(sequence.number, None):
                running.append(sequence.number)
            else:
                queued.add(sequence)
        self.queue.discard(queued)
        if running:
            self.keeper.send({"kind": "abort", "seqs": running})
        self._pump()

    def drop_job(self, job: str, why: Exception) -> None:
        """Forget everything a job waits for; those who wait get `why`."""
        mine = [s for s in self._in_flight.values() if s.job == job]
        for sequence in (*self.queue.drop(job), *mine):
            if not sequence.result.done():
                sequence.result.set_exception(why)
            self._in_flight.pop(sequence.number, None)
        if mine:
            self.keeper.send({"kind": "abort", "seqs": [s.number for s in mine]})
        self._pump()

    def _pump(self) -> None:
        open_ = self.keeper.up.is_set() and not self._holds
        while open_ and len(self._in_flight) < self._slots:
            full = self.quotas.full(s.job for s in self._in_flight.values())
            if self.queue.next_job(full) is None:
                break
            sequence = self.queue.pop(full)
            sequence.begin(self.next_number)
            self.next_number += 1
            self._in_flight[sequence.number] = sequence
            self.keeper.send({**sequence.message, "job": sequence.job, "seq": sequence.number})
        if not self._in_flight:
            self._drained.set()
        else:
            self._drained.clear()

    # --- weights ---------------------------------------------------------------------------------

    async def update_weights(
        self, job: str, source: dict[str, Any], version: int, in_flight: str = "wait"
    ) -> str:
        """Load the weights in `source` (see Update) and return the engine's digest. What is in
        flight finishes first (`wait`), goes on under the new weights (`keep`), or, with `abort`,
        the job's own ends with what it has, and so does what the job has waiting.

        Files must stay until the next update: an engine that is started again reads it.
        Raises Refused, with the old weights in use, EngineLost, and TimeoutError by name.
        """
        what = f"the update to version {version}" if in_flight == "wait" else ""
        async with self._updating, self._held(what):
            message = {"kind": "update", "job": job, "in_flight": in_flight}
            waiting = set(self.queue.of(job))
            self.update, self._lost = await self._load(message, source, version), ""
            self._updated(in_flight, waiting)
            return self.update.digest

    async def reset_weights(self) -> None:
        """Back to the model folder's own weights. Raises EngineLost and TimeoutError by name."""
        async with self._updating:
            self._lost = ""
            if self.update is None:
                return
            self.update = None  # whatever happens: no engine is given these weights again
            try:
                async with self._held("going back to the base weights"):
                    await self._ask(_nothing("update", ""))
            except TimeoutError:
                self.keeper.kill()  # it may have them still; the next one has not
                raise

    async def update_adapter(
        self, job: str, source: dict[str, Any], version: int, in_flight: str = "wait"
    ) -> str:
        """Give the sequences of `job` from now on the LoRA adapter in `source`. Nobody waits: with
        `wait`, what is in flight ends under the adapter it has. Otherwise as `update_weights`."""
        async with self._updating, self._held(""):
            message = {"kind": "adapt", "job": job, "in_flight": in_flight}
            waiting = set(self.queue.of(job))
            self.adapters[job] = await self._load(message, source, version)
            self._updated(in_flight, waiting)
            return self.adapters[job].digest

    async def forget_adapter(self, job: str) -> None:
        """Raises EngineLost and TimeoutError by name."""
        async with self._updating:
            if self.adapters.pop(job, None) is not None:
                await self._living()
                await self._ask(_nothing("adapt", job))

    async def _living(self) -> None:
        """Wait for an engine that is being started again."""
        with _deadline("waiting for an engine"):
            async with asyncio.timeout(UPDATE_TIMEOUT_S):
                while not self.keeper.up.is_set():  # it may be down again before we are told
                    await self.keeper.up.wait()
        if self.failure:
            raise EngineLost(self.failure)

    @contextlib.asynccontextmanager
    async def _held(self, drained_for: str):
        """With a living engine that is given nothing new, and with nothing in it if that is named
        for which it must be so."""
        self._holds += 1
        try:
            waits = f"{drained_for}: waiting for {self.in_flight} sequences in flight"
            with _deadline(waits):
                async with asyncio.timeout(UPDATE_TIMEOUT_S):
                    await (self._drained.wait() if drained_for else asyncio.sleep(0))
            await self._living()
            yield
        finally:
            self._holds -= 1
            self._pump()

    def _updated(self, in_flight: str, waiting: set[Sequence]) -> None:
        """`waiting` is what the job had here when the update came, and still has: it was held."""
        self.counters.updates += 1
        if in_flight == "abort":
            not_begun = {s for s in waiting if s.message["kind"] == "draw"}
            self.queue.discard(not_begun)
            for sequence in not_begun:
                if not sequence.result.done():
                    sequence.result.set_result(dict(NOT_BEGUN))

    async def _load(self, message: dict[str, Any], source: dict[str, Any], version: int) -> Update:
        digest = await self._ask({**message, "source": source, "version": version})
        return Update(source, version, digest)

    async def _ask(self, message: dict[str, Any]) -> str:
        """Have the engine load something; the digest of what it read."""
        if not self.keeper.runs:
            raise EngineLost("the engine died before a weight update")
        self._answer = asyncio.get_running_loop().create_future()
        self.keeper.send(message)
        try:
            with _deadline(f"loading version {message['version']}"):
                async with asyncio.timeout(UPDATE_TIMEOUT_S):
                    answer = await self._answer
        except TimeoutError:
            self.keeper.kill()  # nobody knows its weights, and its answer would pass for another's
            raise
        finally:
            self._answer = None
        if answer["kind"] == "refused":
            raise Refused(answer["error"])
        return answer["digest"]

    # --- what the keeper tells -------------------------------------------------------------------

    @property
    def loading(self) -> bool:
        return self._answer is not None

    def took(self, message: dict[str, Any]) -> None:
        if message["kind"] in ("updated", "refused"):
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(message)
            return
        if message["kind"] == "partial":
            return self._grew(message["news"])
        sequence = self._in_flight.pop(message["seq"], None)
        if sequence is not None and not sequence.result.done():
            if message["kind"] == "failed":
                sequence.result.set_exception(Refused(message["error"]))
            elif not sequence.end(message):
                sequence.result.set_exception(EngineLost(OTHERWISE))
            else:
                self._count(sequence.job, len(message.get("ids", ())))
                sequence.result.set_result(message)
        self._pump()

    def _grew(self, news: list[list[Any]]) -> None:
        """What sequences that are told as they grow have drawn since."""
        for number, *drawn in news:
            sequence = self._in_flight.get(number)
            if sequence is not None and not sequence.grow(*drawn):
                sequence.result.set_exception(EngineLost(OTHERWISE))
                del self._in_flight[number]
                self.keeper.send({"kind": "abort", "seqs": [number]})
        self._pump()

    def _count(self, job: str, tokens: int) -> None:
        for tally in (self.counters.total, self.counters.by_job.setdefault(job, Tally())):
            tally.sequences += 1
            tally.generated_tokens += tokens

    def ended(self, why: EngineLost) -> None:
        self._fail_answer(EngineLost(f"{why}, during a weight update"))

    def emptied(self) -> None:
        """What was in flight runs again, before what waits."""
        self.counters.restarts = self.keeper.restarts
        lost, self._in_flight = list(self._in_flight.values()), {}
        self._drained.set()
        for sequence in reversed(lost):
            if sequence.result.done():
                continue
            if sequence.attempts >= MAX_ATTEMPTS:
                sequence.result.set_exception(
                    EngineLost(f"the engine died {sequence.attempts} times on this sequence")
                )
            else:
                self.queue.push(sequence.job, sequence, sequence.tokens, first=True)

    async def restore(self) -> None:
        """Raises EngineLost where the weights come out with another digest."""
        if self.update is not None:
            if self.update.source["channel"] == "files":
                await self._replay("update", "", self.update)
            else:
                self._lose(self.update)
        for job, update in list(self.adapters.items()):
            await self._replay("adapt", job, update)

    def _lose(self, update: Update) -> None:
        """Nobody gets anything under other weights than those of `update`."""
        self._lost = (
            f"the engine died and was started again, and the weights of version {update.version} "
            f"(digest {update.digest}) came without files that it could read again: send them again"
        )
        self.update = None
        self._end_all(WeightsLost(self._lost))

    async def _replay(self, kind: str, job: str, update: Update) -> None:
        message = {"kind": kind, "job": job, "in_flight": "wait"}
        again = await self._load(message, update.source, update.version)
        if again != update:
            raise EngineLost(
                f"the weights of version {update.version} came back with digest {again.digest}, "
                f"they had {update.digest}"
            )

    def is_up(self) -> None:
        self._pump()

    def gave_up(self, why: EngineLost) -> None:
        self._end_all(why)
        self._fail_answer(why)
        self._drained.set()

    def _end_all(self, error: Exception) -> None:
        """Everybody who waits for a sequence gets `error`."""
        waiting = list(self._in_flight.values())
        self._in_flight = {}
        while len(self.queue):
            waiting.append(self.queue.pop())
        for sequence in waiting:
            if not sequence.result.done():
                sequence.result.set_exception(error)

    def _fail_answer(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _nothing(kind: str, job: str) -> dict[str, Any]:
    """The message after which the model folder's own weights are in use, or no adapter."""
    return {"kind": kind, "job": job, "source": None, "version": 0, "in_flight": "wait"}


@contextlib.contextmanager
def _deadline(what: str):
    try:
        yield
    except TimeoutError:
        raise TimeoutError(f"{what} took more than {UPDATE_TIMEOUT_S:g} s") from None
