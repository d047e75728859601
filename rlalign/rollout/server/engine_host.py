"""The server's side of its engine process: sequences in flight, weight updates between them, and a
new process when the old one dies.

A sequence that was in flight when the engine died was never answered, so it runs again, from its
own seed and under the weights it began with: the last update is replayed, and its digest must come
out the same. A sequence that takes the engine down twice is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlalign.errors import RlalignError
from rlalign.rollout.server.engine_process import EngineLost, EngineProcess
from rlalign.rollout.server.fair import FairQueue

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2  # of one sequence that was in flight when the engine died
MAX_RESTARTS = 3  # within RESTART_WINDOW_S: then the engine is given up
RESTART_WINDOW_S = 300.0
UPDATE_TIMEOUT_S = 300.0


class Refused(RlalignError):
    """The engine refused a sequence or an update; nothing else is affected."""


@dataclass(eq=False)
class Sequence:
    """One sequence to draw or score, and where its result goes."""

    job: str
    message: dict[str, Any]  # for the engine, without its number
    tokens: int  # what it may cost
    result: asyncio.Future[dict[str, Any]]
    attempts: int = 0
    number: int = -1


@dataclass(frozen=True)
class Update:
    """Weights in use: replayed when the engine is started again."""

    path: Path
    version: int
    digest: str


@dataclass
class Tally:
    """What a job was given."""

    generated_tokens: int = 0
    sequences: int = 0  # drawn and scored


@dataclass
class Counters:
    """Since the server started; of the engine, whichever process it is."""

    total: Tally = field(default_factory=Tally)
    by_job: dict[str, Tally] = field(default_factory=dict)
    restarts: int = 0
    updates: int = 0


class EngineHost:
    """One engine process and what is in flight in it.

    `setup` is what engine_main.start takes; at most `slots` sequences are in the process at a time,
    the others wait here, where jobs take turns. All methods belong to one event loop.
    """

    def __init__(self, setup: dict[str, Any], *, slots: int, start_timeout_s: float) -> None:
        self._setup, self._slots, self._start_timeout_s = setup, slots, start_timeout_s
        self.queue: FairQueue[Sequence] = FairQueue()
        self.counters = Counters()
        self.update: Update | None = None  # None: the model folder's own weights
        self.adapters: dict[str, Update] = {}  # by job
        self.limits: dict[str, Any] = {}  # what the engine said of itself: vocab and max_len
        self.failure = ""  # why there is no engine, for good
        self._in_flight: dict[int, Sequence] = {}
        self._numbers = itertools.count()
        self._holds = 0  # above 0: nothing new goes to the engine
        self._up = asyncio.Event()  # there is an engine with the weights in use, or never again
        self._drained = asyncio.Event()
        self._answer: asyncio.Future[dict[str, Any]] | None = None  # of an update
        self._updating = asyncio.Lock()
        self._deaths: deque[float] = deque()
        self._process: EngineProcess | None = None
        self._reading: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None

    # --- sequences -------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def alive(self) -> bool:
        return self._up.is_set() and not self.failure

    def submit(self, job: str, message: dict[str, Any], tokens: int) -> Sequence:
        """Queue one sequence; its result comes through `Sequence.result`: the engine's `done`
        message, Refused or EngineLost."""
        if self.failure:
            raise EngineLost(self.failure)
        sequence = Sequence(job, message, tokens, asyncio.get_running_loop().create_future())
        self.queue.push(job, sequence, tokens)
        self._pump()
        return sequence

    def cancel(self, sequences: list[Sequence]) -> None:
        """Forget sequences nobody waits for any more. What is queued is passed over in its turn."""
        running = []
        for sequence in sequences:
            if not sequence.result.cancel() and not sequence.result.cancelled():
                sequence.result.exception()  # seen: nobody else will ask
            elif self._in_flight.pop(sequence.number, None):
                running.append(sequence.number)
        if running:
            self._send({"kind": "abort", "seqs": running})
        self._pump()

    def drop_job(self, job: str) -> None:
        """Forget everything a job waits for."""
        mine = [s for s in self._in_flight.values() if s.job == job]
        self.cancel([*self.queue.drop(job), *mine])

    def _pump(self) -> None:
        open_ = self._up.is_set() and not self._holds
        while open_ and len(self.queue) and len(self._in_flight) < self._slots:
            sequence = self.queue.pop()
            if sequence.result.done():
                continue
            sequence.number = next(self._numbers)
            sequence.attempts += 1
            self._in_flight[sequence.number] = sequence
            self._send({**sequence.message, "job": sequence.job, "seq": sequence.number})
        if not self._in_flight:
            self._drained.set()
        else:
            self._drained.clear()

    # --- weights ---------------------------------------------------------------------------------

    async def update_weights(self, path: Path, version: int) -> str:
        """Let what is in flight finish, load the folder `path`, and return the engine's digest.

        The folder must stay until the next update: an engine that is started again reads it.
        Raises Refused, with the old weights in use, EngineLost, and TimeoutError by name.
        """
        async with self._quiet("the weight update"):
            self.update = await self._load(path, version)
            self.counters.updates += 1
            return self.update.digest

    async def reset_weights(self) -> None:
        """Back to the model folder's own weights. Raises EngineLost and TimeoutError by name."""
        async with self._quiet("going back to the base weights"):
            if self.update is not None:
                self.update = None  # whatever happens: no engine is given these weights again
                await self._ask({"kind": "update", "path": None, "version": 0})

    async def update_adapter(self, job: str, path: Path, version: int) -> str:
        """Give the sequences of `job` from now on the LoRA adapter in `path`; the others, and those
        in flight, are not disturbed. Otherwise as `update_weights`."""
        async with self._updating:
            await self._living()
            self.adapters[job] = await self._load(path, version, job)
            self.counters.updates += 1
            return self.adapters[job].digest

    async def forget_adapter(self, job: str) -> None:
        async with self._updating:
            await self._living()
            if self.adapters.pop(job, None) is not None:
                await self._ask({"kind": "adapt", "job": job, "path": None, "version": 0})

    async def _living(self) -> None:
        """Wait for an engine that is being started again."""
        async with asyncio.timeout(UPDATE_TIMEOUT_S):
            await self._up.wait()
        if self.failure:
            raise EngineLost(self.failure)

    @contextlib.asynccontextmanager
    async def _quiet(self, what: str):
        """One at a time, with a living engine and nothing in it."""
        async with self._updating:
            self._holds += 1
            try:
                async with asyncio.timeout(UPDATE_TIMEOUT_S):
                    await self._drained.wait()
                await self._living()
                yield
            except TimeoutError:
                raise TimeoutError(
                    f"{what} waited {UPDATE_TIMEOUT_S:g} s for {self.in_flight} sequences in flight"
                ) from None
            finally:
                self._holds -= 1
                self._pump()

    async def _load(self, path: Path, version: int, job: str | None = None) -> Update:
        """Weights for everybody, or an adapter for one job."""
        message = {"kind": "update"} if job is None else {"kind": "adapt", "job": job}
        digest = await self._ask({**message, "path": str(path), "version": version})
        return Update(path, version, digest)

    async def _ask(self, message: dict[str, Any]) -> str:
        """Have the engine load something; the digest of what it read."""
        self._answer = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            async with asyncio.timeout(UPDATE_TIMEOUT_S):
                answer = await self._answer
        except TimeoutError:
            raise TimeoutError(
                f"loading version {message['version']} took {UPDATE_TIMEOUT_S:g} s"
            ) from None
        finally:
            self._answer = None
        if answer["kind"] == "refused":
            raise Refused(answer["error"])
        return answer["digest"]

    # --- the process -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises EngineLost with the engine's own words where it cannot start."""
        await self._start()
        self._up.set()
        self._pump()

    async def close(self) -> None:
        for task in (self._reading, self._reviving):
            if task is not None:
                task.cancel()
        self._give_up("the server is shutting down")

    async def _start(self) -> None:
        self._process = process = EngineProcess()
        await process.start(self._setup, self._start_timeout_s)
        self.limits = process.ready
        self._reading = asyncio.create_task(self._read(process))

    async def _read(self, process: EngineProcess) -> None:
        """Take results until the process ends, then bring it back."""
        why = ""
        with contextlib.suppress(EOFError, ConnectionError):
            while not why:
                message = await process.receive()
                why = message["error"] if message["kind"] == "broken" else ""
                if not why:
                    self._take(message)
        if self._reviving is None or self._reviving.done():
            why = why or f"the engine {process.post_mortem()}"
            self._reviving = asyncio.create_task(self._died(why))
        else:  # it died again before it had its weights
            self._fail_answer(EngineLost(why or f"the engine {process.post_mortem()}"))

    def _take(self, message: dict[str, Any]) -> None:
        if message["kind"] in ("updated", "refused"):
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(message)
            return
        sequence = self._in_flight.pop(message["seq"], None)
        if sequence is not None and not sequence.result.done():
            if message["kind"] == "failed":
                sequence.result.set_exception(Refused(message["error"]))
            else:
                self._count(sequence.job, len(message.get("ids", ())))
                sequence.result.set_result(message)
        self._pump()

    def _count(self, job: str, tokens: int) -> None:
        for tally in (self.counters.total, self.counters.by_job.setdefault(job, Tally())):
            tally.sequences += 1
            tally.generated_tokens += tokens

    async def _died(self, why: str) -> None:
        while True:
            now = time.monotonic()
            self._deaths.append(now)
            while now - self._deaths[0] > RESTART_WINDOW_S:
                self._deaths.popleft()
            if len(self._deaths) > MAX_RESTARTS:
                return self._give_up(f"{why}; it was the {len(self._deaths)}th time in a row")
            try:
                return await self._revive(why)
            except EngineLost as error:
                why = str(error)
            except (Refused, TimeoutError) as error:
                return self._give_up(f"{why}; and then: {error}")

    async def _revive(self, why: str) -> None:
        """A new process with the weights in use."""
        log.warning("engine: %s; starting another", why)
        self._up.clear()
        self.counters.restarts += 1
        if self._reading is not None:
            self._reading.cancel()
        self._stop()
        self._requeue()
        self._fail_answer(EngineLost(f"{why}, during a weight update"))
        await self._start()
        if self.update is not None:
            await self._replay(self.update)
        for job, update in self.adapters.items():
            await self._replay(update, job)
        self._up.set()
        self._pump()

    async def _replay(self, update: Update, job: str | None = None) -> None:
        again = await self._load(update.path, update.version, job)
        if again != update:
            raise EngineLost(
                f"the weights of version {update.version} came back with digest {again.digest}, "
                f"they had {update.digest}"
            )

    def _requeue(self) -> None:
        """What was in flight runs again, before what waits."""
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

    def _give_up(self, why: str) -> None:
        """There is no engine any more: everybody who waits is told why."""
        log.info("engine: %s; giving up", why)
        self.failure = why
        self._stop()
        error = EngineLost(why)
        waiting = list(self._in_flight.values())
        self._in_flight = {}
        while len(self.queue):
            waiting.append(self.queue.pop())
        for sequence in waiting:
            if not sequence.result.done():
                sequence.result.set_exception(error)
        self._fail_answer(error)
        self._drained.set()
        self._up.set()

    def _fail_answer(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is not None:
            self._process.send(message)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()
