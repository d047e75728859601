"""The rollout server with an engine that does as it is told, in one process, without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from rlalign.rollout.server import engine_keeper
from rlalign.rollout.server.app import RolloutServer
from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.engine_process import EngineLost
from rlalign.rollout.server.quotas import Quotas
from rlalign.rollout.server.texts import Texts

TOKENS = {"generate": "g", "job": "j", "admin": "a"}
WEIGHTS = b"weights"


class FakeProcess:
    """Stands for EngineProcess. Weights are the bytes of a file, refused if they are b"bad"; a
    sequence that is drawn tells the version it was drawn under."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._out = plan, asyncio.Queue()
        self.ready: dict[str, Any] = {}
        self.version, self.sent = 0, []
        self._tasks: list[asyncio.Task[None]] = []
        plan.processes.append(self)

    async def start(self, setup: dict[str, Any], timeout_s: float) -> None:
        await self._plan.may_start.wait()
        if self._plan.on_start is not None:
            self._plan.on_start(self)
        self.ready = {"vocab": 100, "max_len": 50, "eos_ids": [1]}

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self._tasks.append(asyncio.create_task(self._work(message)))

    async def receive(self) -> dict[str, Any]:
        message = await self._out.get()
        if message is None:
            raise EOFError
        return message

    async def post_mortem(self) -> str:
        return "died"

    def kill(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._out.put_nowait(None)

    stop = kill

    def give(self, message: dict[str, Any] | None) -> None:
        self._out.put_nowait(message)

    async def _work(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "abort":
            return
        if self._plan.on_message is not None and self._plan.on_message(self, message):
            return
        loads = kind in ("update", "adapt")
        await (self._plan.may_load if loads else self._plan.may_draw).wait()
        if not loads:
            logp = [0.0] * (len(message["ids"]) - 1)
            done = {"kind": "done", "seq": message["seq"], "ids": [1], "logp": logp}
            return self.give({**done, "finish": "stop", "spans": [[1, self.version]]})
        content = b"" if message["source"] is None else read(Path(message["source"]["path"]))
        if content in (b"bad", None):
            return self.give({"kind": "refused", "error": f"these weights are {content}"})
        self.version = message["version"]
        self.give({"kind": "updated", "digest": hashlib.sha256(content).hexdigest()[:16]})


def read(folder: Path) -> bytes | None:
    try:
        return (folder / "a.safetensors").read_bytes()
    except OSError:
        return None


class Plan:
    """What the engine does: waits for the gates that are shut, and asks the hooks first."""

    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.may_start, self.may_load, self.may_draw = (asyncio.Event() for _ in range(3))
        for gate in (self.may_start, self.may_load, self.may_draw):
            gate.set()
        self.on_start: Callable[[FakeProcess], None] | None = None  # may raise
        self.on_message: Callable[[FakeProcess, dict[str, Any]], bool] | None = None  # True: taken

    @property
    def engine(self) -> FakeProcess:
        return self.processes[-1]


class World:
    """A server over such an engine, and a client."""

    def __init__(
        self,
        spool: Path,
        monkeypatch: Any,
        max_loras: int = 0,
        slots: int = 8,
        stall_s: float = 60.0,
        max_requests: int = 1024,
        tokenizer: Any = None,
        methods: Any = None,
        **quotas: int,
    ) -> None:
        self.plan, self.spool = Plan(), spool
        monkeypatch.setattr(engine_keeper, "EngineProcess", lambda: FakeProcess(self.plan))
        self.host = EngineHost(
            {}, slots=slots, start_timeout_s=5, stall_s=stall_s, quotas=Quotas(**quotas)
        )
        folder = spool / "model"  # most tests need no tokenizer, and there is none
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        self.texts = Texts(str(folder))
        described = {"model": "fake", "max_loras": max_loras}
        self.server = RolloutServer(self.host, spool, self.texts, described, methods=methods)
        self.asgi = self.server.asgi(TOKENS, 2**20, max_requests)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.asgi),
            base_url="http://server",
            headers={"Authorization": "Bearer a"},
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[World]:
        await self.host.start()
        async with self.server._lifespan(None), self.http:
            yield self
        await self.host.close()
        self.server.searches.close()
        self.texts.close()

    async def job(self, **body: Any) -> str:
        answer = await self.http.post("/v1/jobs", json={"name": "job", **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def write(self, job: str, version: int, content: bytes = WEIGHTS) -> None:
        folder = self.spool / job / str(version)
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(content)

    async def update(self, job: str, version: int, content: bytes = WEIGHTS) -> httpx.Response:
        self.write(job, version, content)
        return await self.http.post(f"/v1/jobs/{job}/weights", json={"version": version})

    def draw(self, job: str, count: int = 1) -> asyncio.Task[httpx.Response]:
        body = {
            "requests": [{"ids": [5, 6], "seeds": list(range(count))}],
            "params": {"max_completion_length": 4},
        }
        return asyncio.create_task(self.http.post(f"/v1/jobs/{job}/draw", json=body))

    async def call(
        self,
        method: str,
        path: str,
        *messages: dict[str, Any],
        leave: asyncio.Event | None = None,
        hear: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    ) -> list[dict[str, Any]]:
        """One request whose client sends `messages`, and is then silent or goes when it shall
        `leave`; what it was sent, which it may `hear` as it comes, or be slow to."""
        sent, waiting = [], list(messages)

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop(0)
            await (leave or asyncio.Event()).wait()
            return GONE

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if hear is not None:
                await hear(message)

        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": b"", "headers": [(b"authorization", b"Bearer a")],
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "scheme": "http", "server": ("x", 80), "client": ("y", 1), "root_path": "",
        }  # fmt: skip
        await self.asgi(scope, receive, send)
        return sent


def body(content: bytes) -> dict[str, Any]:
    return {"type": "http.request", "body": content, "more_body": False}


GONE = {"type": "http.disconnect"}

__all__ = ["GONE", "TOKENS", "EngineLost", "FakeProcess", "World", "body"]
