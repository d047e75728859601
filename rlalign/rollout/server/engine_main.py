"""The engine process: one vLLM, fed by the server over a socket, until the server goes away.

Started by `engine_host` as a plain script (rlalign/process.py). Between two steps of vLLM it takes
in whatever has arrived, so sequences of any job join the running batch at once. Messages to it:

    {"kind": "draw", "job": "a", "seq": 7, "ids": [..], "seed": 3, "params": {..}}    one sequence;
                                             with "partial": true, its tokens are told as they come
    {"kind": "score", "job": "a", "seq": 8, "ids": [..]}
    {"kind": "choose" | "latents" | "ascend", "job": "a", "seq": 9, ..}       search_messages.py
    {"kind": "abort", "seqs": [7]}
    {"kind": "update", "job": "a", "source": {..}, "version": 4, "in_flight": "wait"}
                                             rlalign.rollout.channels; null: the model folder's own
    {"kind": "adapt", "job": "a", "source": {..}, "version": 4, "in_flight": "wait"}
                                             a folder with a LoRA adapter; null: none any more

and from it `ready`, `done` and `failed` (of a sequence), `updated` and `refused` (of the last two),
every few seconds `alive`, and what was drawn since it was last told, with the last token's version:

    {"kind": "partial", "news": [[7, ids, logp, version], ..]}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ALIVE_S = 2.0  # between two signs of life
IDLE_S = 1.0  # between two looks at the socket while nothing runs
TELL_S = 0.05  # between two partial messages: it reads as a flow; 0.01 costs twice as much


def main() -> None:
    sock_fd, lifeline_fd, path = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    sys.path[:] = path

    from rlalign.channel import Channel
    from rlalign.process import die_with_parent
    from rlalign.rollout.channels.receive import Receiver
    from rlalign.rollout.engine import EngineError

    die_with_parent(lifeline_fd)
    channel = Channel(socket.socket(fileno=sock_fd))
    setup = channel.receive()
    try:
        stream = start(setup)
    except EngineError as error:
        return channel.send({"kind": "broken", "error": str(error)})
    limits, eos_ids = stream.limits, sorted(stream.eos_ids)
    ready = {"max_len": limits.max_len, "vocab": limits.vocab, "eos_ids": eos_ids}
    channel.send({"kind": "ready", **ready})
    try:
        Engine(channel, stream, Receiver(setup["device"])).run()
    except EOFError:  # the server is gone
        pass
    except EngineError as error:
        channel.send({"kind": "broken", "error": str(error)})


def start(setup: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoTokenizer

    from rlalign.config.schema import VllmConfig
    from rlalign.rollout import vllm_start
    from rlalign.rollout.vllm_stream import VllmStream

    if setup["num_threads"]:
        torch.set_num_threads(setup["num_threads"])
    cfg = VllmConfig(**setup["vllm"])
    if vllm_start.enforces_eager(setup["device"], cfg):
        torch.compiler.set_stance("force_eager")
    return VllmStream(
        setup["model"],
        AutoTokenizer.from_pretrained(setup["model"]),
        cfg,
        max_len=setup["max_len"],
        dtype=setup["dtype"],
        device=setup["device"],
    )


@dataclass
class Running:
    """A sequence in vLLM, and what is known of its tokens."""

    message: dict[str, Any]
    adapter: Any
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)  # [tokens, version that drew them]
    before: int = 0  # tokens that vLLM did not draw but was given, when it was last interrupted
    told: int = 0  # tokens, in partial messages

    @property
    def is_drawn(self) -> bool:
        return self.message["kind"] == "draw"

    def forget(self) -> None:
        """Begin anew."""
        self.ids, self.logp, self.spans = [], [], []

    @property
    def known(self) -> int:
        """Of the tokens that vLLM drew."""
        return len(self.ids) - self.before

    def take_in(self, ids: list[int], logp: list[float], version: int) -> None:
        """What vLLM drew since, under `version`."""
        if not ids:
            return
        self.ids += ids
        self.logp += logp
        if self.spans and self.spans[-1][1] == version:
            self.spans[-1][0] += len(ids)
        else:
            self.spans.append([len(ids), version])


class Engine:
    """Takes messages in and gives results out, a step of vLLM at a time."""

    def __init__(self, channel: Any, stream: Any, receiver: Any) -> None:
        self._channel, self._stream, self._receiver = channel, stream, receiver
        self._running: dict[int, Running] = {}
        self._partial: set[int] = set()  # those of them whose tokens are told as they come
        self._told = 0.0  # when they were
        self._adapters: dict[str, Any] = {}  # by job

    def run(self) -> None:
        """Until the server goes away (EOFError) or vLLM breaks (EngineError)."""
        said = time.monotonic()
        while True:
            if time.monotonic() - said > ALIVE_S:
                said = time.monotonic()
                self._channel.send({"kind": "alive"})
            wait_s = 0.0 if self._stream.unfinished else IDLE_S
            while self._channel.ready(wait_s):
                self._take(self._channel.receive())
                wait_s = 0.0
            if self._stream.unfinished:
                for output in self._stream.step():
                    self._give(output)
                if self._partial and time.monotonic() - self._told > TELL_S:
                    self._tell()

    def _take(self, message: dict[str, Any]) -> None:
        from rlalign.rollout.engine import EngineError

        kind = message["kind"]
        if kind == "abort":
            return self._abort(message["seqs"])
        try:
            if kind == "update":
                return self._update(message)
            if kind == "adapt":
                return self._adapt(message)
            if kind == "ascend":
                return self._climb(message)
            self._add(message["seq"], Running(message, self._adapters.get(message["job"])))
        except EngineError as error:
            self._stream.check_usable()  # raises where vLLM's state is lost
            answer = failed(message["seq"]) if "seq" in message else {"kind": "refused"}
            self._channel.send(answer | {"error": str(error)})

    # --- weights ---------------------------------------------------------------------------------

    def _update(self, message: dict[str, Any]) -> None:
        with self._interrupted(message, list(self._running)):
            if message["source"] is None:
                got = self._stream.reset_weights()
            else:
                got = self._load(message["source"], message["version"])
        self._channel.send({"kind": "updated", "digest": got.digest})

    def _load(self, source: dict[str, Any], version: int) -> Any:
        from rlalign.rollout.engine import EngineError

        try:
            with contextlib.closing(self._receiver.receive(source)) as weights:
                return self._stream.update_weights(weights, version)
        except EngineError:
            raise
        except Exception as error:  # of torch or of the channel; vLLM has seen nothing
            raise EngineError(
                f"weights of version {version} cannot be read: {type(error).__name__}: {error}. "
                "The old ones stay in use."
            ) from error

    def _adapt(self, message: dict[str, Any]) -> None:
        """Sequences of the job from now on have this adapter. Those that run keep theirs, unless
        the update says otherwise."""
        job, source, digest = message["job"], message["source"], ""
        mine = [seq for seq, running in self._running.items() if running.message["job"] == job]
        before = [self._adapters.get(job), *(self._running[seq].adapter for seq in mine)]
        with self._interrupted(message, [] if message["in_flight"] == "wait" else mine):
            if source is None:
                self._adapters.pop(job, None)
            else:
                folder = Path(source["path"])
                self._adapters[job] = self._stream.load_adapter(folder, message["version"])
                digest = self._adapters[job].version.digest
            for seq in mine if message["in_flight"] != "wait" else ():
                self._running[seq].adapter = self._adapters.get(job)
        for adapter in {id(adapter): adapter for adapter in before}.values():
            self._unload(adapter)
        self._channel.send({"kind": "updated", "digest": digest})

    @contextlib.contextmanager
    def _interrupted(self, message: dict[str, Any], seqs: list[int]) -> Iterator[None]:
        """With these sequences out of vLLM. Afterwards those of the job that sent the update end
        there, with `in_flight` abort; the others go on: their next token is drawn from the weights
        in use then, over caches that are computed anew."""
        self._stream.check_usable()
        for seq in seqs:
            self._look(seq, self._running[seq])
        self._stream.abort([*map(str, seqs)])
        ends = False
        try:
            yield
            ends = message["in_flight"] == "abort"
        finally:
            for seq in seqs:
                running = self._pop(seq)
                if ends and running.is_drawn and running.message["job"] == message["job"]:
                    self._send_drawn(seq, running, "abort")
                else:
                    self._add(seq, running)

    def _version(self, adapter: Any) -> int:
        return (self._stream if adapter is None else adapter).version.version

    def _unload(self, adapter: Any) -> None:
        """Give up an adapter that is in use by no job and no sequence any more."""
        used = [*self._adapters.values(), *(r.adapter for r in self._running.values())]
        if adapter is not None and not any(adapter is other for other in used):
            self._stream.unload_adapter(adapter)

    # --- sequences -------------------------------------------------------------------------------

    def _abort(self, seqs: list[int]) -> None:
        self._stream.abort([str(seq) for seq in seqs])
        for seq in seqs:
            if seq in self._running:
                self._unload(self._pop(seq).adapter)

    def _add(self, seq: int, running: Running) -> None:
        from rlalign.rollout.server.engine_requests import for_vllm

        message = running.message
        if message.get("params", {}).get("num_top"):
            running.forget()  # the likeliest tokens of its first steps are nowhere any more
        running.before = len(running.ids)
        ids, params = for_vllm(self._stream, message, running.ids)
        self._stream.add(str(seq), ids, params, running.adapter)
        self._running[seq] = running
        if message.get("partial"):
            self._partial.add(seq)

    def _climb(self, message: dict[str, Any]) -> None:
        """A step of latents: at once, as vLLM has no part in it."""
        from rlalign.rollout.server.engine_requests import climbed

        adapter = self._adapters.get(message["job"])
        done = climbed(self._stream, message, adapter)
        self._channel.send({"kind": "done", "seq": message["seq"], **done})

    def _pop(self, seq: int) -> Running:
        self._partial.discard(seq)
        return self._running.pop(seq)

    def _look(self, seq: int, running: Running) -> None:
        """Take in what a running sequence has drawn."""
        if running.is_drawn:
            ids, logp = self._stream.drawn(str(seq), running.known)
            running.take_in(ids, logp, self._version(running.adapter))

    def _tell(self) -> None:
        """Say what is new of sequences that are told as they grow. Log-probs that are not finite
        are kept back: the sequence will fail."""
        news = []
        for seq in self._partial:
            running = self._running[seq]
            self._look(seq, running)
            ids, logp = running.ids[running.told :], running.logp[running.told :]
            if ids and math.isfinite(sum(logp)):
                running.told = len(running.ids)
                news.append([seq, ids, logp, running.spans[-1][1]])
        self._told = time.monotonic()
        if news:
            self._channel.send({"kind": "partial", "news": news})

    def _give(self, output: Any) -> None:
        from rlalign.rollout.engine import EngineError
        from rlalign.rollout.server.engine_requests import read_output
        from rlalign.rollout.vllm_requests import drawn_top, sampled_logp

        seq = int(output.request_id)
        running = self._pop(seq)
        self._unload(running.adapter)
        if not running.is_drawn:
            try:
                done = read_output(self._stream, running.message, output)
            except EngineError as error:
                return self._channel.send(failed(seq) | {"error": str(error)})
            return self._channel.send({"kind": "done", "seq": seq, **done})
        completion = output.outputs[0]
        ids, logp = completion.token_ids, sampled_logp(completion.logprobs)
        known, version = running.known, self._version(running.adapter)
        running.take_in(ids[known:], logp[known:], version)
        top = drawn_top(completion) if running.message["params"].get("num_top") else ()
        self._send_drawn(seq, running, completion.finish_reason, top)

    def _send_drawn(self, seq: int, running: Running, finish: str, top: Any = ()) -> None:
        if not math.isfinite(sum(running.logp)):
            error = "the model's logits are not finite: the weights diverged"
            return self._channel.send(failed(seq) | {"error": error})
        done = {"ids": running.ids, "logp": running.logp, "spans": running.spans, "finish": finish}
        if top:
            done["top"] = top
        self._channel.send({"kind": "done", "seq": seq, **done})


def failed(seq: int) -> dict[str, Any]:
    return {"kind": "failed", "seq": seq}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
