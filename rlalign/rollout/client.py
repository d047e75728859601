"""A job on a rollout server, as a rollout engine: what `rollout.engine=server` uses.

The lease is taken when the client is built and renewed by a thread until it is closed; a run that
dies is silent, and its lease ends by itself. Weights go through the server's folder in memory, one
tensor a file, and the server answers with the digest its engine computed of what it read.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlalign.config.schema import ServerConfig
from rlalign.rollout.engine import Capabilities, EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.limits import Limits
from rlalign.rollout.server.connection import ConnectionFileError, connection_path, read_connection
from rlalign.rollout.server.tls import trust
from rlalign.rollout.vllm_weights import ADAPTER_FILE, ADAPTER_PREFIX
from rlalign.types import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    PolicyVersion,
    Sample,
    VersionSpan,
)

FINISH_REASONS = {"stop": FINISH_STOP, "length": FINISH_LENGTH}
CONNECT_S = 10.0
SILENCE_S = 60.0  # a stream says something every few seconds, or the server is gone


class RolloutClient:
    """`RolloutEngine` over a server that `rlalign serve` started.

    `name` is the job's. With `adapter`, the content of PEFT's adapter_config.json, the job shares
    the server's model with others and sends its adapter alone, if the server has room for adapters;
    otherwise it owns the server's weights. Raises EngineError where there is no such server, and
    where other jobs have what it needs for longer than `cfg.wait_s`.

    >>> with RolloutClient("my-run", tokenizer, ServerConfig()) as engine:     # doctest: +SKIP
    ...     [[sample]] = engine.generate([GenerateRequest("p", (5, 9), seeds=(1,))], params)
    """

    def __init__(
        self, name: str, tokenizer: Any, cfg: ServerConfig, adapter: dict[str, Any] | None = None
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
        kind = "full" if adapter is None else "lora"
        body = {
            "name": name, "kind": kind, "ttl_s": cfg.ttl_s, "wait_s": cfg.wait_s,
            "priority": cfg.priority,
        }  # fmt: skip
        lease = self._call("POST", "/v1/jobs", body, timeout_s=cfg.wait_s + SILENCE_S)
        self._job = f"/v1/jobs/{lease['id']}"
        self._spool = _shared_folder(lease)
        self._limits = Limits(lease["vocab"], lease["max_len"])
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
        self._check_usable()
        self._limits.check(requests, params)
        body = {
            "requests": [{"ids": r.token_ids, "seeds": r.seeds} for r in requests if r.seeds],
            "params": {
                "max_completion_length": params.max_completion_length,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "stop_token_ids": params.stop_token_ids,
                "ignore_eos": params.ignore_eos,
            },
        }
        asked = [i for i, r in enumerate(requests) if r.seeds]
        drawn: dict[tuple[int, int], dict[str, Any]] = {}
        total = sum(len(r.seeds) for r in requests)
        for line in self._stream(f"{self._job}/draw", body, total) if total else ():
            drawn[asked[line["request"]], line["index"]] = line
        return self._samples(requests, drawn)

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
        self, parameters: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> PolicyVersion:
        """Hand new weights (or those of the adapter) over and return the server's receipt:
        `version` with the digest that its engine computed of what it read.

        Raises EngineError, with the old weights in use, for weights that the engine refuses.
        """
        self._check_usable()
        folder = self._spool / str(version)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._make(folder)
            if self._adapter is None:
                for i, (name, tensor) in enumerate(parameters):
                    _write(folder / f"{i:06}.safetensors", {name: tensor})
            else:
                (folder / "adapter_config.json").write_text(json.dumps(self._adapter))
                tensors = {ADAPTER_PREFIX + name: tensor for name, tensor in parameters}
                _write(folder / ADAPTER_FILE, tensors)
            answer = self._call(
                "POST", f"{self._job}/weights", {"version": version}, timeout_s=self._cfg.timeout_s
            )
        except BaseException:  # what the server has taken is out of our reach
            shutil.rmtree(folder, ignore_errors=True)
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
        with contextlib.suppress(httpx.HTTPError):  # the lease ends by itself too
            self._http.request("DELETE", self._job)
        self._http.close()

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- HTTP ------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
        self._check_usable()
        try:
            answer = self._http.request(method, path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise EngineError(self._unreachable(error)) from error
        if not answer.is_success:
            raise EngineError(_reason(answer))
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
                    raise EngineError(_reason(answer))
                for text in answer.iter_lines():
                    if time.monotonic() > deadline:
                        raise EngineError(
                            f"generating: {done} of {total} sequences after "
                            f"{self._cfg.timeout_s:g} s, which is the deadline; raise "
                            "rollout.server.timeout_s or send fewer at once"
                        )
                    line = json.loads(text) if text else {}
                    if "error" in line:
                        raise EngineError(f"the rollout server: {line['error']}")
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

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            # A lease that is over has no folder any more, and the server says so.
            self._call("POST", f"{self._job}/heartbeat", timeout_s=SILENCE_S)
            raise EngineError(f"no folder for weights can be made: {error}") from error

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

    def _samples(
        self,
        requests: Sequence[GenerateRequest],
        drawn: dict[tuple[int, int], dict[str, Any]],
    ) -> list[list[Sample]]:
        keys = [(i, j) for i, r in enumerate(requests) for j in range(len(r.seeds))]
        ids = [drawn[key]["ids"] for key in keys]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []
        groups: list[list[Sample]] = [[] for _ in requests]
        for (i, j), text in zip(keys, texts, strict=True):
            line, request = drawn[i, j], requests[i]
            groups[i].append(
                Sample(
                    prompt_id=request.prompt_id,
                    index=request.first_index + j,
                    token_ids=tuple(line["ids"]),
                    logp=tuple(line["logp"]),
                    finish_reason=FINISH_REASONS.get(line["finish"], FINISH_ABORT),
                    spans=(VersionSpan(len(line["ids"]), line["version"]),),
                    text=text,
                )
            )
        return groups


def _shared_folder(lease: dict[str, Any]) -> Path:
    """The job's folder on the server, where this machine sees it too."""
    folder = Path(lease["spool"])
    try:
        probe = (folder.parent / "probe").read_text()
    except OSError:
        probe = ""
    if probe != lease["probe"]:
        raise EngineError(
            f"the server's folder for weights, {folder}, cannot be seen from here: run the job on "
            "the server's machine and as its user"
        )
    return folder


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path)
    except (OSError, SafetensorError) as error:
        raise EngineError(
            f"weight {next(iter(tensors), '')!r} cannot be written to {path}: {error}. Make room "
            "there; the server still has the old weights"
        ) from error


def _reason(answer: httpx.Response) -> str:
    try:
        reason = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        reason = answer.text[:500]
    return f"the rollout server: {reason} (HTTP {answer.status_code})"
