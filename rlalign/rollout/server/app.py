"""The server's routes: leases, weights, and sequences as token ids in and out.

Every answer is JSON; a refusal is `{"error": reason}`. `draw` streams one line of JSON for each
finished sequence, and an empty one every few seconds, so that no side has to guess whether the
other is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match, Route

from rlalign.errors import RlalignError
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.limits import Limits
from rlalign.rollout.server import openai_format
from rlalign.rollout.server.answers import Handler, answering, plain, status_of
from rlalign.rollout.server.bodies import AcquireBody, DrawBody, ScoreBody
from rlalign.rollout.server.connected import Stream, unless_gone
from rlalign.rollout.server.doors import Bounds, Doors
from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.engine_process import EngineLost
from rlalign.rollout.server.jobs import Busy, Job, JobError, JobTable
from rlalign.rollout.server.methods import Methods
from rlalign.rollout.server.metrics import Metrics
from rlalign.rollout.server.openai import OpenAi
from rlalign.rollout.server.page import page
from rlalign.rollout.server.searches import Searches
from rlalign.rollout.server.sequences import Sequence, Tally
from rlalign.rollout.server.streams import as_they_come, outcome
from rlalign.rollout.server.texts import Texts
from rlalign.rollout.server.weights import WeightRoutes

REAP_S = 0.25  # between two looks for leases that are over
UPLOAD_S = 600.0  # for one file of weights to arrive
PROTOCOL = 2  # what client and server must agree on

# However many requests are open: a lease that cannot be renewed would be lost to others' load.
ALWAYS = {
    ("GET", "/health"), ("POST", "/v1/jobs/{job}/heartbeat"), ("DELETE", "/v1/jobs/{job}"),
}  # fmt: skip
OPENAI_PATHS = (
    "/v1/models", "/v1/models/{model:path}", "/v1/completions", "/v1/chat/completions",
)  # fmt: skip


class RolloutServer:
    """The application: an engine, its jobs, and the folder through which weights come.

    `spool` is a private folder, best in memory; `texts` has the model's tokenizer; `describe` is
    told to every client. An update that is uploaded may have `max_weights_bytes`. `methods` are
    models by the name of NAME@METHOD.
    """

    def __init__(
        self,
        host: EngineHost,
        spool: Path,
        texts: Texts,
        describe: Mapping[str, Any],
        max_weights_bytes: int = 2**34,
        methods: Methods | None = None,
    ) -> None:
        self._host, self._spool, self._describe = host, spool, dict(describe)
        self._max_weights_bytes = max_weights_bytes
        self._jobs = JobTable(self._describe["max_loras"])
        self._weights = WeightRoutes(host, self._jobs, spool, max_weights_bytes)
        self._metrics = Metrics(host, self._jobs)
        self.searches = Searches(host, texts.folder)
        model = self._describe["model"]
        self._openai = OpenAi(host, self._jobs, texts, model, self.searches, methods)
        self._freed = asyncio.Event()  # another one each time
        self._endings: set[asyncio.Task[None]] = set()  # of jobs whose lease ran out
        self.probe = secrets.token_hex(16)
        (spool / "probe").write_text(self.probe)

    def asgi(self, tokens: Mapping[str, str], max_body_bytes: int, max_requests: int) -> Any:
        """The application behind its doors."""
        table: list[tuple[str, str, str | None, Handler]] = [
            ("GET", "/", None, page),
            ("GET", "/health", None, self.health),
            ("GET", "/v1/server", "generate", self.server),
            ("POST", "/v1/jobs", "job", self.acquire),
            ("POST", "/v1/jobs/{job}/heartbeat", "job", self.heartbeat),
            ("DELETE", "/v1/jobs/{job}", "job", self.release),
            ("PUT", "/v1/jobs/{job}/weights/{version}/{file}", "job", self._weights.upload),
            ("POST", "/v1/jobs/{job}/weights", "job", self._weights.update),
            ("POST", "/v1/jobs/{job}/draw", "job", self.draw),
            ("POST", "/v1/jobs/{job}/score", "job", self.score),
            ("GET", "/metrics", "generate", self._metrics.scrape),
            ("GET", "/v1/models", "generate", self._openai.models),
            ("GET", "/v1/models/{model:path}", "generate", self._openai.retrieve),
            ("POST", "/v1/completions", "generate", self._openai.completions),
            ("POST", "/v1/chat/completions", "generate", self._openai.chat),
        ]
        routes = [
            Route(path, answering(handler, _refusal(path)), methods=[method])
            for method, path, _, handler in table
        ]
        scopes = {(method, path): scope for method, path, scope, _ in table}
        app = Starlette(routes=routes, lifespan=self._lifespan)
        larger = {"/v1/jobs/{job}/weights/{version}/{file}": (self._max_weights_bytes, UPLOAD_S)}
        bounds = Bounds(max_body_bytes, max_requests, larger, ALWAYS)
        return Doors(app, tokens, scopes, lambda m, p: _registered(routes, m, p), bounds)

    async def close(self) -> None:
        """Tell everybody who waits that the server is shutting down."""
        await self._host.close()
        self._notify()

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
            "searches": self.searches.running,
            **dataclasses.asdict(self._host.quotas),
            "generated_tokens": self._host.counters.total.generated_tokens,
            "alive": self._host.alive,
            "restarts": self._host.counters.restarts,
            "updates": self._host.counters.updates,
            "jobs": [self._described(job) for job in self._jobs],
        }

    async def acquire(self, request: Request) -> Any:
        body = AcquireBody.model_validate_json(await request.body())
        job = await unless_gone(request, self._acquire(body))
        self._host.queue.set_weight(job.id, job.priority)
        try:
            if await request.is_disconnected():  # it left as the lease came
                raise ClientDisconnect
            (self._spool / job.id).mkdir(mode=0o700)
        except BaseException:
            await self._end(self._jobs.release(job.id))
            raise
        spool = str(self._spool / job.id)
        return {**_public(job), **_limits(self._host), "spool": spool, "probe": self.probe}

    async def heartbeat(self, request: Request) -> Any:
        job = _public(self._jobs.renew(request.path_params["job"]))
        return {**job, "digest": ""} if self._host.lost else job

    async def release(self, request: Request) -> Any:
        job = self._jobs.release(request.path_params["job"])
        await self._end(job)
        return {"released": job.id}

    async def draw(self, request: Request) -> Any:
        body = DrawBody.model_validate_json(await self._body(request))
        job = self._jobs.renew(request.path_params["job"])
        limits = Limits(**_limits(self._host))
        limits.check_params(SamplingParams(**body.params.model_dump()))
        wishes, places = [], []
        for i, item in enumerate(body.requests):
            params = item.params or body.params
            longest = item.max_completion_length or params.max_completion_length
            own = {**params.model_dump(), "max_completion_length": longest}
            limits.check_params(SamplingParams(**own))
            limits.check_ids(item.ids, longest, f"request {i}")
            for j, seed in enumerate(item.seeds):
                message = {"kind": "draw", "ids": item.ids, "seed": seed, "params": own}
                wishes.append((message, len(item.ids) + longest))
                places.append((i, j))
        sequences = dict(zip(self._host.submit(job.id, wishes), places, strict=True))
        return Stream(self._lines(sequences), lambda: self._host.cancel(sequences))

    async def score(self, request: Request) -> Any:
        body = ScoreBody.model_validate_json(await self._body(request))
        job = self._jobs.renew(request.path_params["job"])
        limits = Limits(**_limits(self._host))
        for i, ids in enumerate(body.sequences):
            limits.check_ids(ids, 0, f"sequence {i}")
        wishes = [({"kind": "score", "ids": i}, len(i)) for i in body.sequences if len(i) > 1]
        sequences = self._host.submit(job.id, wishes)
        try:
            results = iter(await unless_gone(request, _scores(sequences)))
        finally:
            self._host.cancel(sequences)
        return {"logp": [next(results) if len(ids) > 1 else [] for ids in body.sequences]}

    def _described(self, job: Job) -> dict[str, Any]:
        tally = self._host.counters.by_job.get(job.id, Tally())
        waiting, in_flight = self._host.load(job.id)
        return {
            **_public(job), "generated_tokens": tally.generated_tokens, "waiting": waiting,
            "in_flight": in_flight, "left_s": round(self._jobs.left_s(job), 1),
        }  # fmt: skip

    # --- what they stand on ----------------------------------------------------------------------

    async def _body(self, request: Request) -> bytes:
        """Of a request to a job. It may take its time: look for the job again afterwards."""
        self._jobs.get(request.path_params["job"])
        return await request.body()

    async def _lines(self, sequences: dict[Sequence, tuple[int, int]]) -> AsyncIterator[bytes]:
        """A line for each sequence as it ends. A client that goes away takes the rest along."""
        try:
            async with contextlib.aclosing(as_they_come(self._host, list(sequences))) as batches:
                async for batch in batches:
                    yield b"".join(_line(s, *sequences[s]) for s in batch) or b"\n"
            yield _encoded({"end": len(sequences)})
        except RlalignError as error:
            yield _encoded({"error": str(error), "status": status_of(error)})

    async def _acquire(self, body: AcquireBody) -> Job:
        """Wait for the lease as long as the client wants to, behind those who asked before."""
        loop = asyncio.get_running_loop()
        deadline, place = loop.time() + body.wait_s, self._jobs.line_up(body.name)
        try:
            while True:
                if self._host.failure:
                    raise EngineLost(self._host.failure)
                try:
                    return self._jobs.acquire(**body.model_dump(exclude={"wait_s"}), place=place)
                except Busy:
                    left = deadline - loop.time()
                    if left <= 0:
                        raise
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._freed.wait()
        finally:
            self._jobs.leave(place)
            self._notify()  # the next in line may be lucky

    async def _end(self, job: Job) -> None:
        """What a job leaves behind goes; the engine is back on its own weights before the next."""
        self._host.drop_job(job.id, JobError("the job is over: its lease ended"))
        self._metrics.over(job)
        try:
            if job.kind == "lora":
                await self._host.forget_adapter(job.id)
            else:
                await self._host.reset_weights()
        finally:
            shutil.rmtree(self._spool / job.id, ignore_errors=True)
            self._jobs.free(job)
            self._notify()

    def _notify(self) -> None:
        """Have those who wait for a lease look again."""
        self._freed.set()
        self._freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any):
        reaper = asyncio.create_task(self._reap())
        yield
        reaper.cancel()

    async def _reap(self) -> None:
        while True:
            due = time.monotonic() + REAP_S
            await asyncio.sleep(REAP_S)
            late = time.monotonic() - due
            if late > REAP_S:  # we stood still: heartbeats wait in their sockets
                self._jobs.extend(late)
            for job in self._jobs.expired():
                ending = asyncio.create_task(self._reaped(job))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def _reaped(self, job: Job) -> None:
        with contextlib.suppress(RlalignError, TimeoutError):  # the engine's; others see it too
            await self._end(job)


async def _scores(sequences: list[Sequence]) -> list[list[float]]:
    return [(await sequence.result)["logp"] for sequence in sequences]


def _limits(host: EngineHost) -> dict[str, int]:
    return {name: host.limits[name] for name in ("vocab", "max_len")}


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
        "priority": job.priority, "version": job.version.version, "digest": job.version.digest,
    }  # fmt: skip


def _line(sequence: Sequence, request: int, index: int) -> bytes:
    return _encoded({**outcome(sequence), "request": request, "index": index})


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
