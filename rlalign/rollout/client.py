"""A job on a rollout server, as a rollout engine: what `rollout.engine=server` uses.

The lease is taken when the client is built and renewed by a thread until it is closed; a run that
dies is silent, and its lease ends by itself. Weights go through one of rlalign.rollout.channels,
and the server answers with the digest its engine computed of what it read.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import torch

from rlalign.config.schema import ServerConfig
from rlalign.rollout.channels import WeightChannel
from rlalign.rollout.channels.files import MemoryChannel, UploadChannel
from rlalign.rollout.channels.follow import FollowChannel
from rlalign.rollout.channels.group import GroupChannel
from rlalign.rollout.channels.ipc import IpcChannel
from rlalign.rollout.engine import (
    Capabilities,
    EngineError,
    GenerateRequest,
    SamplingParams,
    WeightsLost,
)
from rlalign.rollout.limits import Limits
from rlalign.rollout.server.connection import ConnectionFileError, connection_path, read_connection
from rlalign.rollout.server.tls import trust
from rlalign.types import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    PolicyVersion,
    Sample,
    VersionSpan,
)

FINISH_REASONS = {"stop": FINISH_STOP, "length": FINISH_LENGTH}
LOST = 410  # the status that says WeightsLost
CONNECT_S = 10.0
SILENCE_S = 60.0  # a stream says something every few seconds, or the server is gone


class RolloutClient:
    """`RolloutEngine` over a server that `rlalign serve` started.

    `name` is the job's. With `adapter`, the content of PEFT's adapter_config.json, the job shares
    the server's model with others and sends its adapter alone, if the server has room for adapters;
    otherwise it owns the server's weights. A job of several processes has one lease: the first one
    takes it and sends the weights, the others are given its `lease`. Raises EngineError where there
    is no such server, and where other jobs have what it needs for longer than `cfg.wait_s`.

    >>> with RolloutClient("my-run", tokenizer, ServerConfig()) as engine:     # doctest: +SKIP
    ...     [[sample]] = engine.generate([GenerateRequest("p", (5, 9), seeds=(1,))], params)
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        cfg: ServerConfig,
        adapter: dict[str, Any] | None = None,
        lease: dict[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._cfg = tokenizer, cfg
        try:
            connection = read_connection(connection_path(cfg.name))
        except ConnectionFileError as error:
            raise EngineError(str(error)) from error
        self._http = httpx.Client(
            base_url=connection["url"],
            headers={"Authorization": f"Bearer {connection['tokens']['job']}"},
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            verify=trust(connection),
            trust_env=False,  # a proxy has no business with a token
        )
        self._closed = threading.Event()
        if not self._call("GET", "/v1/server", timeout_s=SILENCE_S)["max_loras"]:
            adapter = None
        self._adapter = adapter
        self.capabilities = Capabilities(
            shares_parameters=False,
            hidden_states=False,
            score_temperature=False,
            adapter_only=adapter is not None,
        )
        self._leads = lease is None
        self.lease = self._acquire(name) if lease is None else lease
        self._job = f"/v1/jobs/{self.lease['id']}"
        try:
            self._channel = self._open_channel()
        except BaseException:
            self._give_back()
            raise
        self._limits = Limits(self.lease["vocab"], self.lease["max_len"])
        self._version = PolicyVersion(0, "")
        self._lost = ""  # why the lease is gone
        self._heart = threading.Thread(target=self._beat, name="rollout-lease", daemon=True)
        self._heart.start()

    @property
    def version(self) -> PolicyVersion:
        return self._version

    def generate(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> list[list[Sample]]:
        """One list of samples per request, one sample per seed, in order.

        Raises EngineError for requests that the server refuses, for a lease or an engine that is
        lost, and after `rollout.server.timeout_s`.
        """
        groups: list[list[Sample]] = [[] for _ in requests]
        for i, samples in self.stream(requests, params):
            groups[i] = samples
        return groups

    def stream(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]:
        """As `generate`, each request's place and samples as soon as all of them are finished.

        Several streams may be read at once, by as many threads.
        """
        self._check_usable()
        self._limits.check(requests, params)
        wanted = [
            {
                "ids": request.token_ids,
                "seeds": request.seeds,
                "max_completion_length": request.max_completion_length,
                "params": None if request.params is None else asdict(request.params),
            }
            for request in requests
            if request.seeds
        ]
        body = {"requests": wanted, "params": asdict(params)}
        asked = [i for i, r in enumerate(requests) if r.seeds]
        drawn: dict[int, dict[int, dict[str, Any]]] = {i: {} for i in asked}
        total = sum(len(r.seeds) for r in requests)
        for line in self._stream(f"{self._job}/draw", body, total) if total else ():
            i = asked[line["request"]]
            drawn[i][line["index"]] = line
            if len(drawn[i]) == len(requests[i].seeds):
                yield i, self._samples(requests[i], drawn.pop(i))

    def score(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """Log-prob of every token given its prefix: float32 [len - 1] per sequence.

        Raises EngineError for another temperature than 1, which vLLM does not score at.
        """
        if temperature != 1:
            raise EngineError(
                f"the server's vLLM scores at temperature 1 only, not {temperature}: use generate, "
                "whose log-probs are those of the sampling temperature"
            )
        self._check_usable()
        for i, sequence in enumerate(sequences):
            self._limits.check_ids(sequence, 0, f"sequence {i}")
        body = {"sequences": [list(sequence) for sequence in sequences]}
        answer = self._call("POST", f"{self._job}/score", body, timeout_s=self._cfg.timeout_s)
        return [torch.tensor(logp, dtype=torch.float32) for logp in answer["logp"]]

    def update_weights(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        version: int,
        in_flight: str | None = None,
    ) -> PolicyVersion:
        """Hand new weights (or those of the adapter) over and return the server's receipt:
        `version` with the digest that its engine computed of what it read.

        `in_flight` says what becomes of the job's sequences on the server: they end under the old
        weights ("wait"), end now with the tokens that they have and finish reason "abort"
        ("abort"), or go on under the new ones ("keep"); None: as `rollout.server.in_flight` says.
        Raises EngineError, with the old weights in use, for weights that the engine refuses.
        """
        self._check_usable()

        def post(announcement: dict[str, Any]) -> Any:
            body = {"version": version, "in_flight": in_flight or self._cfg.in_flight}
            return self._call(
                "POST", f"{self._job}/weights", body | announcement, timeout_s=self._cfg.timeout_s
            )

        try:
            answer = self._channel.send(parameters, version, post)
        except EngineError:
            # A lease that is over has no folder any more, and the server says so.
            self._renew()
            raise
        self._version = PolicyVersion(answer["version"], answer["digest"])
        return self._version

    def sleep(self) -> None:
        """Nothing: other jobs may be awake."""

    def wake(self) -> None: ...

    def close(self) -> None:
        """Give the lease back. Closing twice is fine; other calls raise EngineError."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._heart.join()
        self._channel.close()
        self._give_back()

    def _give_back(self) -> None:
        if self._leads:
            with contextlib.suppress(httpx.HTTPError):  # the lease ends by itself too
                self._http.request("DELETE", self._job)
        self._http.close()

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _acquire(self, name: str) -> dict[str, Any]:
        cfg, kind = self._cfg, "full" if self._adapter is None else "lora"
        body = {
            "name": name, "kind": kind, "ttl_s": cfg.ttl_s, "wait_s": cfg.wait_s,
            "priority": cfg.priority,
        }  # fmt: skip
        return self._call("POST", "/v1/jobs", body, timeout_s=cfg.wait_s + SILENCE_S)

    def _open_channel(self) -> WeightChannel:
        lease, kind, sees = self.lease, self._cfg.channel, _sees(self.lease)
        if not self._leads:
            return FollowChannel(self._renew, self._cfg.timeout_s)
        if kind == "auto":
            kind = "memory" if sees else "upload"
        if kind in ("memory", "ipc") and not sees:
            raise EngineError(
                f"rollout.server.channel={kind}, but the server's folder for weights, "
                f"{lease['spool']}, cannot be seen from here: run the job on the server's machine "
                "and as its user, or use channel=auto"
            )
        if self._adapter is not None and kind not in ("memory", "upload"):
            raise EngineError(
                f"rollout.server.channel={kind} does not carry adapters: use auto, memory or upload"
            )
        if kind == "memory":
            return MemoryChannel(Path(lease["spool"]), self._adapter)
        if kind == "upload":
            return UploadChannel(self._put, self._adapter)
        if kind == "ipc":
            return IpcChannel()
        return GroupChannel(kind, _own_address(self._http.base_url))

    def _renew(self) -> dict[str, Any]:
        """The job as the server sees it."""
        return self._call("POST", f"{self._job}/heartbeat", timeout_s=SILENCE_S)

    def _put(self, version: int, name: str, content: bytes) -> None:
        path = f"{self._job}/weights/{version}/{name}"
        self._send("PUT", path, self._cfg.timeout_s, content=content)

    # --- HTTP ------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
        return self._send(method, path, timeout_s, json=body)

    def _send(self, method: str, path: str, timeout_s: float, **body: Any) -> Any:
        self._check_usable()
        try:
            answer = self._http.request(method, path, timeout=timeout_s, **body)
        except httpx.HTTPError as error:
            raise EngineError(self._unreachable(error)) from error
        if not answer.is_success:
            raise _refusal(answer)
        return answer.json()

    def _stream(self, path: str, body: Any, total: int) -> Iterator[dict[str, Any]]:
        """The lines of an answer; EngineError unless all `total` come in time."""
        self._check_usable()
        deadline = time.monotonic() + self._cfg.timeout_s
        done = 0
        try:
            with self._http.stream("POST", path, json=body) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refusal(answer)
                for text in answer.iter_lines():
                    if time.monotonic() > deadline:
                        raise EngineError(
                            f"generating: {done} of {total} sequences after "
                            f"{self._cfg.timeout_s:g} s, which is the deadline; raise "
                            "rollout.server.timeout_s or send fewer at once"
                        )
                    line = json.loads(text) if text else {}
                    if "error" in line:
                        raise _error(line["status"], f"the rollout server: {line['error']}")
                    if "request" in line:
                        done += 1
                        yield line
        except httpx.HTTPError as error:
            raise EngineError(self._unreachable(error)) from error
        if done != total:
            raise EngineError(f"the rollout server sent {done} of {total} sequences and went away")

    def _beat(self) -> None:
        """Renew the lease until the client is closed."""
        while not self._closed.wait(self._cfg.ttl_s / 3):
            try:
                answer = self._http.post(f"{self._job}/heartbeat", timeout=self._cfg.ttl_s / 3)
            except httpx.HTTPError:
                continue  # the next call that matters says what is wrong
            if answer.status_code == 404:
                self._lost = _reason(answer)
                return

    def _check_usable(self) -> None:
        if self._closed.is_set():
            raise EngineError("the client was closed; create a new RolloutClient")
        if getattr(self, "_lost", ""):
            raise EngineError(self._lost)

    def _unreachable(self, error: httpx.HTTPError) -> str:
        return (
            f"the rollout server at {self._http.base_url} does not answer "
            f"({type(error).__name__}: {error}): is it running? Start it with "
            "`rlalign serve MODEL`, and go on with --resume"
        )

    def _samples(self, request: GenerateRequest, drawn: dict[int, dict[str, Any]]) -> list[Sample]:
        lines = [drawn[j] for j in range(len(request.seeds))]
        texts = self._tokenizer.batch_decode(
            [line["ids"] for line in lines], skip_special_tokens=True
        )
        return [
            Sample(
                prompt_id=request.prompt_id,
                index=request.first_index + j,
                token_ids=tuple(line["ids"]),
                logp=tuple(line["logp"]),
                finish_reason=FINISH_REASONS.get(line["finish"], FINISH_ABORT),
                spans=tuple(VersionSpan(*span) for span in line["spans"]),
                text=text,
                top=tuple(tuple((token, logp) for token, logp in t) for t in line.get("top", ())),
            )
            for j, (line, text) in enumerate(zip(lines, texts, strict=True))
        ]


def _sees(lease: dict[str, Any]) -> bool:
    """Whether the job's folder on the server is one on this machine."""
    try:
        return (Path(lease["spool"]).parent / "probe").read_text() == lease["probe"]
    except OSError:
        return False


def _own_address(url: httpx.URL) -> str:
    """Of this machine, as the server sees it."""
    port = url.port or (443 if url.scheme == "https" else 80)
    with socket.create_connection((url.host, port), CONNECT_S) as connection:
        return connection.getsockname()[0]


def _refusal(answer: httpx.Response) -> EngineError:
    return _error(answer.status_code, _reason(answer))


def _error(status: int, reason: str) -> EngineError:
    return WeightsLost(reason) if status == LOST else EngineError(reason)


def _reason(answer: httpx.Response) -> str:
    try:
        reason = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        reason = answer.text[:500]
    return f"the rollout server: {reason} (HTTP {answer.status_code})"
