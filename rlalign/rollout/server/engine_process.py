"""One engine process as the server sees it: messages to it and from it, its start and its end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from rlalign.channel import HEADER, MAX_FRAME_BYTES
from rlalign.errors import RlalignError
from rlalign.process import Child, how_it_ended


class EngineLost(RlalignError):
    """The engine died and could not be brought back, or lost what it was asked for."""


class EngineProcess:
    """Runs engine_main.py; `ready` is what it said of itself when it had started."""

    def __init__(self) -> None:
        self._child: Child | None = Child(Path(__file__).with_name("engine_main.py"))
        self._child.socket.setblocking(False)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.ready: dict[str, Any] = {}

    async def start(self, setup: dict[str, Any], timeout_s: float) -> None:
        """Raises EngineLost with the engine's own words where it cannot start."""
        assert self._child is not None
        self._reader, self._writer = await asyncio.open_connection(sock=self._child.socket)
        self.send(setup)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.receive()
        except TimeoutError:
            self.stop()
            raise EngineLost(f"the engine was not ready within {timeout_s:g} s") from None
        except (EOFError, ConnectionError):
            raise EngineLost(f"the engine {await self.post_mortem()}") from None
        if answer["kind"] == "broken":
            self.stop()
            raise EngineLost(answer["error"])
        self.ready = answer

    def send(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            body = json.dumps(message).encode()
            self._writer.write(HEADER.pack(len(body)) + body)

    async def receive(self) -> dict[str, Any]:
        """EOFError or ConnectionError where the process is gone."""
        assert self._reader is not None
        (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        if size > MAX_FRAME_BYTES:
            raise EOFError(f"a message of {size} bytes was announced: not our protocol")
        return json.loads(await self._reader.readexactly(size))

    async def post_mortem(self) -> str:
        """How it ended, with the end of its output; it is gone then."""
        child = self._child
        if child is not None:
            await asyncio.to_thread(child.wait)  # the memory of a large engine takes its time
        if child is None or child is not self._child:
            return "is not running"
        tail = child.log_tail()
        return f"{how_it_ended(self.stop())}\n{tail}".strip()

    def kill(self) -> None:
        """End it; whoever receives is told."""
        if self._child is not None:
            self._child.kill()

    def stop(self) -> int | None:
        """Kill it; the code it had ended with, None if it had not."""
        if self._writer is not None:
            self._writer.close()
        child, self._child = self._child, None
        return child.stop() if child is not None else None
