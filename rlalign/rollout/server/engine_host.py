"""The server's side of its engine process: sequences in flight, weight updates between them, and a
new process when the old one dies.

A sequence that was in flight when the engine died was never answered, so it runs again, from its
own seed: the last update is replayed, and its digest must come out the same. If another update was
waiting for it, it runs under that one, and its version says so. A sequence that was there each time
the engine died is given up in the end, and so is an engine that dies without finishing anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlalign.rollout.server.engine_process import EngineLost, EngineProcess
from rlalign.rollout.server.fair import FairQueue
from rlalign.rollout.server.quotas import Quotas
from rlalign.rollout.server.sequences import Counters, Refused, Sequence, Tally, Update

log = logging.getLogger(__name__)

MAX_RESTARTS = 3  # in a row, with nothing finished in between: then the engine is given up
MAX_ATTEMPTS = MAX_RESTARTS  # of one sequence: one that kills goes before the engine does
STEADY_S = 300.0  # an engine that lived for so long did not die of how it was started
UPDATE_TIMEOUT_S = 300.0


class EngineHost:
    """One engine process and what is in flight in it.

    `setup` is what engine_main.start takes; at most `slots` sequences are in the process at a time,
    the others wait here, where jobs take turns. All methods belong to one event loop.
    """

    def __init__(
        self, setup: dict[str, Any], *, slots: int, start_timeout_s: float, quotas: Quotas
    ) -> None:
        self._setup, self._slots, self._start_timeout_s = setup, slots, start_timeout_s
        self.quotas = quotas
        self.queue: FairQueue[Sequence] = FairQueue()
        self.counters = Counters()
        self.update: Update | None = None  # None: the model folder's own weights
        self.adapters: dict[str, Update] = {}  # by job
        self.failure = ""  # why there is no engine, for good
        self._in_flight: dict[int, Sequence] = {}
        self.next_number = 0  # of a sequence that goes to the engine
        self._holds = 0  # above 0: nothing new goes to the engine
        self._up = asyncio.Event()  # there is an engine with the weights in use, or never again
        self._drained = asyncio.Event()
        self._answer: asyncio.Future[dict[str, Any]] | None = None  # of an update
        self._updating = asyncio.Lock()
        self._deaths = 0  # in a row
        self._up_since = math.inf
        self._process: EngineProcess | None = None
        self._reading: asyncio.Task[str] | None = None  # its result: why the process ended
        self._keeping: asyncio.Task[None] | None = None
        self.limits: dict[str, Any] = {}  # what the engine said of itself: vocab and max_len

    # --- sequences -------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def alive(self) -> bool:
        return self._up.is_set() and not self.failure

    def load(self, job: str) -> tuple[int, int]:
        """How many sequences of a job wait, and how many are in the engine."""
        return self.queue.waiting(job), sum(s.job == job for s in self._in_flight.values())

    def submit(self, job: str, wishes: list[tuple[dict[str, Any], int]]) -> list[Sequence]:
        """Queue a sequence for each message and the tokens it may cost. Its result comes through
        `Sequence.result`: the engine's `done` message, Refused or EngineLost. Raises TooMany, and
        queues none."""
        if self.failure:
            raise EngineLost(self.failure)
        self.quotas.admit(sum(self.load(job)), len(wishes))
        result = asyncio.get_running_loop().create_future
        sequences = [Sequence(job, message, tokens, result()) for message, tokens in wishes]
        for sequence in sequences:
            self.queue.push(job, sequence, sequence.tokens)
        self._pump()
        return sequences

    def oldest(self, job: str) -> int:
        """The number of the job's oldest sequence in the engine, or of the next one."""
        mine = (number for number, s in self._in_flight.items() if s.job == job)
        return min(mine, default=self.next_number)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Forget sequences nobody waits for any more."""
        running, queued = [], set()
        for sequence in sequences:
            if sequence.result.done() and not sequence.result.cancelled():
                sequence.result.exception()  # seen: nobody else will ask
                continue
            sequence.result.cancel()
            if self._in_flight.pop(sequence.number, None):
                running.append(sequence.number)
            else:
                queued.add(sequence)
        self.queue.discard(queued)
        if running:
            self._send({"kind": "abort", "seqs": running})
        self._pump()

    def drop_job(self, job: str, why: Exception) -> None:
        """Forget everything a job waits for; those who wait get `why`."""
        mine = [s for s in self._in_flight.values() if s.job == job]
        for sequence in (*self.queue.drop(job), *mine):
            if not sequence.result.done():
                sequence.result.set_exception(why)
            self._in_flight.pop(sequence.number, None)
        if mine:
            self._send({"kind": "abort", "seqs": [s.number for s in mine]})
        self._pump()

    def _pump(self) -> None:
        open_ = self._up.is_set() and not self._holds
        while open_ and len(self._in_flight) < self._slots:
            full = self.quotas.full(s.job for s in self._in_flight.values())
            if self.queue.next_job(full) is None:
                break
            sequence = self.queue.pop(full)
            sequence.number, self.next_number = self.next_number, self.next_number + 1
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
        async with self._updating, self._quiet(f"the update to version {version}"):
            self.update = await self._load(path, version)
            self.counters.updates += 1
            return self.update.digest

    async def reset_weights(self) -> None:
        """Back to the model folder's own weights. Raises EngineLost and TimeoutError by name."""
        async with self._updating:
            if self.update is None:
                return
            self.update = None  # whatever happens: no engine is given these weights again
            try:
                async with self._quiet("going back to the base weights"):
                    await self._ask({"kind": "update", "path": None, "version": 0})
            except TimeoutError:
                self._kill()  # it may have them still; the next one has not
                raise

    async def update_adapter(self, job: str, path: Path, version: int) -> str:
        """Give the sequences of `job` from now on the LoRA adapter in `path`; the others, and those
        in flight, are not disturbed. Otherwise as `update_weights`."""
        async with self._updating:
            await self._living()
            self.adapters[job] = await self._load(path, version, job)
            self.counters.updates += 1
            return self.adapters[job].digest

    async def forget_adapter(self, job: str) -> None:
        """Raises EngineLost and TimeoutError by name."""
        async with self._updating:
            if self.adapters.pop(job, None) is not None:
                await self._living()
                await self._ask({"kind": "adapt", "job": job, "path": None, "version": 0})

    async def _living(self) -> None:
        """Wait for an engine that is being started again."""
        with _deadline("waiting for an engine"):
            async with asyncio.timeout(UPDATE_TIMEOUT_S):
                while not self._up.is_set():  # it may be down again before we are told
                    await self._up.wait()
        if self.failure:
            raise EngineLost(self.failure)

    @contextlib.asynccontextmanager
    async def _quiet(self, what: str):
        """With a living engine and nothing in it."""
        self._holds += 1
        try:
            with _deadline(f"{what}: waiting for {self.in_flight} sequences in flight"):
                async with asyncio.timeout(UPDATE_TIMEOUT_S):
                    await self._drained.wait()
            await self._living()
            yield
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
        if self._reading is None or self._reading.done():
            raise EngineLost("the engine died before a weight update")
        self._answer = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            with _deadline(f"loading version {message['version']}"):
                async with asyncio.timeout(UPDATE_TIMEOUT_S):
                    answer = await self._answer
        except TimeoutError:
            self._kill()  # nobody knows its weights, and its answer would be taken for another's
            raise
        finally:
            self._answer = None
        if answer["kind"] == "refused":
            raise Refused(answer["error"])
        return answer["digest"]

    # --- the process -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises EngineLost with the engine's own words where it cannot start."""
        self._reading = await self._start()
        self._is_up()
        self._keeping = asyncio.create_task(self._keep(self._reading))

    async def close(self) -> None:
        self._give_up("the server is shutting down")
        for task in (self._reading, self._keeping):
            if task is not None:
                task.cancel()

    async def _start(self) -> asyncio.Task[str]:
        self._process = process = EngineProcess()
        await process.start(self._setup, self._start_timeout_s)
        self.limits = process.ready
        return asyncio.create_task(self._read(process))

    def _is_up(self) -> None:
        self._up_since = time.monotonic()
        self._up.set()
        self._pump()

    async def _read(self, process: EngineProcess) -> str:
        """Take results until the process ends; why it did."""
        why = ""
        with contextlib.suppress(EOFError, ConnectionError):
            while not why:
                message = await process.receive()
                why = message["error"] if message["kind"] == "broken" else ""
                if not why:
                    self._take(message)
        if not self.failure:
            self._up.clear()
        why = why or f"the engine {await process.post_mortem()}"
        self._fail_answer(EngineLost(f"{why}, during a weight update"))
        return why

    def _take(self, message: dict[str, Any]) -> None:
        if self._up.is_set():
            self._deaths = 0  # it does what it is asked for; a replay proves nothing yet
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

    async def _keep(self, reading: asyncio.Task[str]) -> None:
        """Bring the engine back whenever it ends, until that is of no use."""
        try:
            while not self.failure:
                reading = await self._bring_back(await reading)
        except (EngineLost, Refused, TimeoutError) as error:
            self._give_up(str(error))
        except Exception as error:  # nobody would bring the engine back any more: they must know
            self._give_up(f"the server's own fault: {type(error).__name__}: {error}")
            raise

    async def _bring_back(self, why: str) -> asyncio.Task[str]:
        while True:
            if time.monotonic() - self._up_since > STEADY_S:
                self._deaths = 0
            self._deaths += 1
            if self._deaths > MAX_RESTARTS:
                raise EngineLost(f"{why}; it was the {self._deaths}th time in a row")
            try:
                return await self._revive(why)
            except EngineLost as error:
                why = str(error)

    async def _revive(self, why: str) -> asyncio.Task[str]:
        """A new process with the weights in use."""
        log.warning("engine: %s; starting another", why)
        self._up.clear()
        self._up_since = math.inf
        self.counters.restarts += 1
        self._stop()
        self._requeue()
        self._reading = reading = await self._start()
        if self.update is not None:
            await self._replay(self.update)
        for job, update in list(self.adapters.items()):
            await self._replay(update, job)
        if reading.done():
            raise EngineLost(reading.result())
        self._is_up()
        return reading

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

    def _kill(self) -> None:
        """End the process as if it had died by itself: another one takes over."""
        if self._process is not None and not self.failure:
            self._up.clear()
            self._process.kill()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()


@contextlib.contextmanager
def _deadline(what: str):
    try:
        yield
    except TimeoutError:
        raise TimeoutError(f"{what} took more than {UPDATE_TIMEOUT_S:g} s") from None
