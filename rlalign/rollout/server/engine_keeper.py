"""One engine process after the other: started, watched, and started again when it dies or hangs.

An engine that dies without having finished anything is given up in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import Any, Protocol

from rlalign.rollout.server.engine_process import EngineLost, EngineProcess
from rlalign.rollout.server.sequences import Refused

log = logging.getLogger(__name__)

MAX_RESTARTS = 3  # in a row, with nothing finished in between: then the engine is given up
STEADY_S = 300.0  # an engine that lived for so long did not die of how it was started


class Owner(Protocol):
    """Whose work the engine does."""

    @property
    def loading(self) -> bool:
        """The engine loads weights, and is silent meanwhile."""
        ...

    def took(self, message: dict[str, Any]) -> None:
        """A message from the engine."""

    def ended(self, why: EngineLost) -> None:
        """The process is gone."""

    def emptied(self) -> None:
        """Another process begins, with nothing in it."""

    async def restore(self) -> None:
        """Put the weights in use into the new process."""

    def is_up(self) -> None:
        """It can be used."""

    def gave_up(self, why: EngineLost) -> None:
        """There is no engine any more."""


class EngineKeeper:
    """`setup` is what engine_main.start takes. An engine that says nothing for `stall_s`, and loads
    no weights, hangs. All methods belong to one event loop."""

    def __init__(
        self, setup: dict[str, Any], owner: Owner, *, start_timeout_s: float, stall_s: float
    ) -> None:
        self._setup, self._owner = setup, owner
        self._start_timeout_s, self._stall_s = start_timeout_s, stall_s
        self.limits: dict[str, Any] = {}  # what the engine said of itself: vocab and max_len
        self.failure = ""  # why there is no engine, for good
        self.restarts = 0
        self.up = asyncio.Event()  # there is an engine with the weights in use, or never again
        self._deaths = 0  # in a row
        self._up_since = math.inf
        self._heard = 0.0  # when the engine last said something
        self._process: EngineProcess | None = None
        self._reading: asyncio.Task[str] | None = None  # its result: why the process ended
        self._keeping: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self.up.is_set() and not self.failure

    @property
    def runs(self) -> bool:
        """There is a process, which may not be of use yet."""
        return self._reading is not None and not self._reading.done()

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

    def send(self, message: dict[str, Any]) -> None:
        if self._process is not None:
            self._process.send(message)

    def kill(self) -> None:
        """End the process as if it had died by itself: another one takes over."""
        if self._process is not None and not self.failure:
            self.up.clear()
            self._process.kill()

    async def _start(self) -> asyncio.Task[str]:
        self._process = process = EngineProcess()
        await process.start(self._setup, self._start_timeout_s)
        self.limits = process.ready
        return asyncio.create_task(self._read(process))

    def _is_up(self) -> None:
        self._up_since = time.monotonic()
        self.up.set()
        self._owner.is_up()

    async def _read(self, process: EngineProcess) -> str:
        """Take messages until the process ends; why it did."""
        why, self._heard = "", time.monotonic()
        watching = asyncio.create_task(self._watch(process))
        with contextlib.suppress(EOFError, ConnectionError):
            while not why:
                message = await process.receive()
                self._heard = time.monotonic()
                why = message["error"] if message["kind"] == "broken" else ""
                if not why and message["kind"] != "alive":
                    self._took(message)
        watching.cancel()
        if not self.failure:
            self.up.clear()
        if not why and watching.done() and not watching.cancelled():
            why = watching.result()
        why = why or f"the engine {await process.post_mortem()}"
        self._owner.ended(EngineLost(why))
        return why

    async def _watch(self, process: EngineProcess) -> str:
        """Kill a process that is silent for too long; the reason."""
        while True:
            due = time.monotonic() + self._stall_s / 4
            await asyncio.sleep(self._stall_s / 4)
            late = time.monotonic() - due
            if late > 1 or self._owner.loading:  # we stood still, or it has a deadline of its own
                self._heard = time.monotonic()
            silent = time.monotonic() - self._heard
            if silent > self._stall_s:
                process.kill()
                return f"the engine hung: it said nothing for {silent:.0f} s (stall_s)"

    def _took(self, message: dict[str, Any]) -> None:
        if self.up.is_set() and message["kind"] != "partial":
            self._deaths = 0  # it does what it is asked for; a replay proves nothing yet
        self._owner.took(message)

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
        self.up.clear()
        self._up_since = math.inf
        self.restarts += 1
        self._stop()
        self._owner.emptied()
        self._reading = reading = await self._start()
        await self._owner.restore()
        if reading.done():
            raise EngineLost(reading.result())
        self._is_up()
        return reading

    def _give_up(self, why: str) -> None:
        """There is no engine any more: everybody who waits is told why."""
        log.info("engine: %s; giving up", why)
        self.failure = why
        self._stop()
        self._owner.gave_up(EngineLost(why))
        self.up.set()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()
