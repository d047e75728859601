"""The server's routes: leases, weights, and sequences as token ids in and out.

Every answer is JSON; a refusal is `{"error": reason}`. `draw` streams one line of JSON for each
finished sequence, and an empty one every few seconds, so that no side has to guess whether the
other is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Match, Route

from rlalign.errors import RlalignError
from rlalign.rollout.server import openai_format
from rlalign.rollout.server.answers import Handler, answering, plain
from rlalign.rollout.server.bodies import AcquireBody, DrawBody, ScoreBody, WeightsBody
from rlalign.rollout.server.doors import Doors
from rlalign.rollout.server.engine_host import EngineHost, Refused, Sequence, Tally
from rlalign.rollout.server.engine_process import EngineLost
from rlalign.rollout.server.jobs import Busy, Job, JobTable
from rlalign.rollout.server.metrics import Metrics
from rlalign.rollout.server.openai import OpenAi
from rlalign.rollout.server.page import page
from rlalign.rollout.server.streams import as_they_end, outcome
from rlalign.rollout.server.texts import Texts
from rlalign.types import PolicyVersion

REAP_S = 0.25  # between two looks for leases that are over
PROTOCOL = 1  # what client and server must agree on
OPENAI_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions")


class RolloutServer:
    """The application: an engine, its jobs, and the folder through which weights come.

    `spool` is a private folder, best in memory; `texts` has the model's tokenizer; `describe` is
    told to every client.
    """

    def __init__(
        self, host: EngineHost, spool: Path, texts: Texts, describe: Mapping[str, Any]
    ) -> None:
        self._host, self._spool, self._describe = host, spool, dict(describe)
        self._jobs = JobTable(self._describe["max_loras"])
        self._metrics = Metrics(host, self._jobs)
        self._openai = OpenAi(host, self._jobs, texts, self._describe["model"])
        self._freed = asyncio.Condition()
        self.probe = secrets.token_hex(16)
        (spool / "probe").write_text(self.probe)

    def asgi(self, tokens: Mapping[str, str], max_body_bytes: int) -> Any:
        """The application behind its doors."""
        table: list[tuple[str, str, str | None, Handler]] = [
            ("GET", "/", None, page),
            ("GET", "/health", None, self.health),
            ("GET", "/v1/server", "generate", self.server),
            ("POST", "/v1/jobs", "job", self.acquire),
            ("POST", "/v1/jobs/{job}/heartbeat", "job", self.heartbeat),
            ("DELETE", "/v1/jobs/{job}", "job", self.release),
            ("POST", "/v1/jobs/{job}/weights", "job", self.weights),
            ("POST", "/v1/jobs/{job}/draw", "generate", self.draw),
            ("POST", "/v1/jobs/{job}/score", "generate", self.score),
            ("GET", "/metrics", "generate", self._metrics.scrape),
            ("GET", "/v1/models", "generate", self._openai.models),
            ("POST", "/v1/completions", "generate", self._openai.completions),
            ("POST", "/v1/chat/completions", "generate", self._openai.chat),
        ]
        routes = [
            Route(path, answering(handler, _refusal(path)), methods=[method])
            for method, path, _, handler in table
        ]
        scopes = {(method, path): scope for method, path, scope, _ in table}
        app = Starlette(routes=routes, lifespan=self._lifespan)
        return Doors(app, tokens, scopes, lambda m, p: _registered(routes, m, p), max_body_bytes)

    # --- routes ----------------------------------------------------------------------------------

    async def health(self, request: Request) -> Any:
        if self._host.failure:
            raise EngineLost(self._host.failure)
        return {"status": "ok" if self._host.alive else "starting the engine"}

    async def server(self, request: Request) -> Any:
        return {
            **self._describe,
            "protocol": PROTOCOL,
            "max_len": self._host.limits.get("max_len"),
            "waiting": len(self._host.queue),
            "in_flight": self._host.in_flight,
            "generated_tokens": self._host.counters.total.generated_tokens,
            "alive": self._host.alive,
            "restarts": self._host.counters.restarts,
            "updates": self._host.counters.updates,
            "jobs": [self._described(job) for job in self._jobs],
        }

    async def acquire(self, request: Request) -> Any:
        body = AcquireBody.model_validate_json(await request.body())
        job = await self._acquire(body)
        (self._spool / job.id).mkdir(mode=0o700)
        limits = {name: self._host.limits[name] for name in ("vocab", "max_len")}
        return {**_public(job), **limits, "spool": str(self._spool / job.id), "probe": self.probe}

    async def heartbeat(self, request: Request) -> Any:
        return _public(self._jobs.renew(request.path_params["job"]))

    async def release(self, request: Request) -> Any:
        job = self._jobs.release(request.path_params["job"])
        await self._end(job)
        return {"released": job.id}

    async def weights(self, request: Request) -> Any:
        job = self._jobs.renew(request.path_params["job"])
        version = WeightsBody.model_validate_json(await request.body()).version
        folder = self._spool / job.id / str(version)
        if not any(folder.glob("*.safetensors")):
            raise Refused(f"{folder} holds no safetensors files of version {version}")
        if job.kind == "lora":
            digest = await self._host.update_adapter(job.id, folder, version)
        else:
            digest = await self._host.update_weights(folder, version)
        job.version = PolicyVersion(version, digest)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return {"version": version, "digest": digest}

    async def draw(self, request: Request) -> Any:
        job = self._jobs.renew(request.path_params["job"])
        body = DrawBody.model_validate_json(await request.body())
        sequences = {}
        for i, item in enumerate(body.requests):
            for j, seed in enumerate(item.seeds):
                message = {
                    "kind": "draw", "ids": item.ids, "seed": seed,
                    "params": body.params.model_dump(),
                }  # fmt: skip
                cost = len(item.ids) + body.params.max_completion_length
                sequences[self._host.submit(job.id, message, cost)] = (i, j)
        return StreamingResponse(self._lines(sequences), media_type="application/x-ndjson")

    async def score(self, request: Request) -> Any:
        job = self._jobs.renew(request.path_params["job"])
        body = ScoreBody.model_validate_json(await request.body())
        sequences = [
            self._host.submit(job.id, {"kind": "score", "ids": ids}, len(ids))
            for ids in body.sequences
            if len(ids) > 1
        ]
        try:
            results = iter([(await sequence.result)["logp"] for sequence in sequences])
        finally:
            self._host.cancel(sequences)
        return {"logp": [next(results) if len(ids) > 1 else [] for ids in body.sequences]}

    def _described(self, job: Job) -> dict[str, Any]:
        tally = self._host.counters.by_job.get(job.id, Tally())
        tokens, left_s = tally.generated_tokens, self._jobs.left_s(job)
        return {**_public(job), "generated_tokens": tokens, "left_s": round(left_s, 1)}

    # --- what they stand on ----------------------------------------------------------------------

    async def _lines(self, sequences: dict[Sequence, tuple[int, int]]) -> AsyncIterator[bytes]:
        """A line for each sequence as it ends. A client that goes away takes the rest along."""
        try:
            async with contextlib.aclosing(as_they_end(self._host, list(sequences))) as batches:
                async for batch in batches:
                    yield b"".join(_line(s, *sequences[s]) for s in batch) or b"\n"
            yield _encoded({"end": len(sequences)})
        except RlalignError as error:
            yield _encoded({"error": str(error)})

    async def _acquire(self, body: AcquireBody) -> Job:
        """Wait for the lease as long as the client wants to."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + body.wait_s
        while True:
            try:
                return self._jobs.acquire(body.name, body.kind, body.ttl_s)
            except Busy:
                left = deadline - loop.time()
                if left <= 0:
                    raise
            with contextlib.suppress(TimeoutError):
                async with self._freed, asyncio.timeout(left):
                    await self._freed.wait()

    async def _end(self, job: Job) -> None:
        """What a job leaves behind goes; the engine is back on its own weights before the next."""
        self._host.drop_job(job.id)
        if job.kind == "lora":
            await self._host.forget_adapter(job.id)
        else:
            await self._host.reset_weights()
        shutil.rmtree(self._spool / job.id, ignore_errors=True)
        async with self._freed:
            self._freed.notify_all()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any):
        reaper = asyncio.create_task(self._reap())
        yield
        reaper.cancel()

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_S)
            for job in self._jobs.expired():
                with contextlib.suppress(EngineLost, TimeoutError):
                    await self._end(job)


def _refusal(path: str) -> Callable[[int, str], dict[str, Any]]:
    """How a route words what it refuses: OpenAI's clients expect its format."""
    return openai_format.refusal if path in OPENAI_PATHS else plain


def _registered(routes: list[Route], method: str, path: str) -> str | None:
    """The path a route was registered under that takes this request."""
    scope = {"type": "http", "method": method, "path": path, "root_path": ""}
    return next((route.path for route in routes if route.matches(scope)[0] == Match.FULL), None)


def _public(job: Job) -> dict[str, Any]:
    return {
        "id": job.id, "name": job.name, "kind": job.kind, "ttl_s": job.ttl_s,
        "version": job.version.version, "digest": job.version.digest,
    }  # fmt: skip


def _line(sequence: Sequence, request: int, index: int) -> bytes:
    return _encoded({**outcome(sequence), "request": request, "index": index})


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
