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
import json
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlalign.channel import HEADER, MAX_FRAME_BYTES
from rlalign.errors import RlalignError
from rlalign.process import Child, how_it_ended
from rlalign.rollout.server.fair import FairQueue

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2  # of one sequence that was in flight when the engine died
MAX_RESTARTS = 3  # within RESTART_WINDOW_S: then the engine is given up
RESTART_WINDOW_S = 300.0
UPDATE_TIMEOUT_S = 300.0


class EngineLost(RlalignError):
    """The engine died and could not be brought back, or lost what it was asked for."""


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
class Counters:
    """Since the server started; of the engine, whichever process it is."""

    generated_tokens: int = 0
    sequences: int = 0
    restarts: int = 0
    updates: int = 0
    by_job: dict[str, int] = field(default_factory=dict)  # generated tokens


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
        self.ready: dict[str, Any] = {}  # what the engine said of itself
        self.failure = ""  # why there is no engine, for good
        self._in_flight: dict[int, Sequence] = {}
        self._numbers = itertools.count()
        self._holds = 0  # above 0: nothing new goes to the engine
        self._up = asyncio.Event()  # there is an engine with the weights in use, or never again
        self._drained = asyncio.Event()
        self._answer: asyncio.Future[dict[str, Any]] | None = None  # of an update
        self._updating = asyncio.Lock()
        self._deaths: deque[float] = deque()
        self._child: Child | None = None
        self._writer: asyncio.StreamWriter | None = None
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
        """Forget sequences nobody waits for any more."""
        running = []
        for sequence in sequences:
            if not sequence.result.cancel() and not sequence.result.cancelled():
                sequence.result.exception()  # seen: nobody else will ask
                continue
            waiting = self.queue.remove(sequence.job, sequence)
            if not waiting and self._in_flight.pop(sequence.number, None):
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
            self._send({**sequence.message, "seq": sequence.number})
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
            digest = await self._load(path, version)
            self.update = Update(path, version, digest)
            self.counters.updates += 1
            return digest

    async def reset_weights(self) -> None:
        """Back to the model folder's own weights. Raises EngineLost and TimeoutError by name."""
        async with self._quiet("going back to the base weights"):
            if self.update is not None:
                self.update = None  # whatever happens: no engine is given these weights again
                await self._load(None, 0)

    @contextlib.asynccontextmanager
    async def _quiet(self, what: str):
        """One at a time, with a living engine and nothing in it."""
        async with self._updating:
            self._holds += 1
            try:
                async with asyncio.timeout(UPDATE_TIMEOUT_S):
                    await self._drained.wait()
                    await self._up.wait()
                if self.failure:
                    raise EngineLost(self.failure)
                yield
            except TimeoutError:
                raise TimeoutError(
                    f"{what} waited {UPDATE_TIMEOUT_S:g} s for {self.in_flight} sequences in flight"
                ) from None
            finally:
                self._holds -= 1
                self._pump()

    async def _load(self, path: Path | None, version: int) -> str:
        self._answer = asyncio.get_running_loop().create_future()
        folder = None if path is None else str(path)
        self._send({"kind": "update", "path": folder, "version": version})
        try:
            async with asyncio.timeout(UPDATE_TIMEOUT_S):
                answer = await self._answer
        except TimeoutError:
            raise TimeoutError(f"loading version {version} took {UPDATE_TIMEOUT_S:g} s") from None
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
        child = self._child = Child(Path(__file__).with_name("engine_main.py"))
        child.socket.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=child.socket)
        self._send(self._setup)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                answer = await _receive(reader)
        except TimeoutError:
            self._stop_child()
            raise EngineLost(
                f"the engine was not ready within {self._start_timeout_s:g} s"
            ) from None
        except (EOFError, ConnectionError):
            raise EngineLost(f"the engine {self._post_mortem()}") from None
        if answer["kind"] == "broken":
            self._stop_child()
            raise EngineLost(answer["error"])
        self.ready = answer
        self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Take results until the process ends, then bring it back."""
        why = ""
        with contextlib.suppress(EOFError, ConnectionError):
            while not why:
                message = await _receive(reader)
                why = message["error"] if message["kind"] == "broken" else ""
                if not why:
                    self._take(message)
        if self._reviving is None or self._reviving.done():
            self._reviving = asyncio.create_task(self._died(why))
        else:  # it died again before it had its weights
            self._fail_answer(EngineLost(why or f"the engine {self._post_mortem()}"))

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
        self.counters.sequences += 1
        self.counters.generated_tokens += tokens
        self.counters.by_job[job] = self.counters.by_job.get(job, 0) + tokens

    async def _died(self, why: str) -> None:
        why = why or f"the engine {self._post_mortem()}"
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
        self._stop_child()
        self._requeue()
        self._fail_answer(EngineLost(f"{why}, during a weight update"))
        await self._start()
        if self.update is not None:
            digest = await self._load(self.update.path, self.update.version)
            if digest != self.update.digest:
                raise EngineLost(
                    f"the weights of version {self.update.version} came back with digest {digest}, "
                    f"they had {self.update.digest}"
                )
        self._up.set()
        self._pump()

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
        self._stop_child()
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
        if self._writer is not None and not self._writer.is_closing():
            body = json.dumps(message).encode()
            self._writer.write(HEADER.pack(len(body)) + body)

    def _post_mortem(self) -> str:
        """How it ended, with the end of its output."""
        if self._child is None:
            return "is not running"
        self._child.wait()
        tail = self._child.log_tail()
        return f"{how_it_ended(self._stop_child())}\n{tail}".strip()

    def _stop_child(self) -> int | None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        child, self._child = self._child, None
        return child.stop() if child is not None else None


async def _receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    """EOFError where the other end is gone."""
    (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    if size > MAX_FRAME_BYTES:
        raise EOFError(f"a message of {size} bytes was announced: not our protocol")
    return json.loads(await reader.readexactly(size))
