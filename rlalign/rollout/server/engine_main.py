"""The engine process: one vLLM, fed by the server over a socket, until the server goes away.

Started by `engine_host` as a plain script (rlalign/process.py). Between two steps of vLLM it takes
in whatever has arrived, so sequences of any job join the running batch at once. Messages to it:

    {"kind": "draw", "seq": 7, "ids": [..], "seed": 3, "params": {..}}     one sequence
    {"kind": "score", "seq": 8, "ids": [..]}
    {"kind": "abort", "seqs": [7]}
    {"kind": "update", "path": "..", "version": 4}       a folder of safetensors; null: the model's

and from it `ready`, `done` and `failed` (of a sequence), `updated` and `refused` (of an update).
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IDLE_S = 1.0  # between two looks at the socket while nothing runs


def main() -> None:
    sock_fd, lifeline_fd, path = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    sys.path[:] = path

    from rlalign.channel import Channel
    from rlalign.process import die_with_parent
    from rlalign.rollout.engine import EngineError

    die_with_parent(lifeline_fd)
    channel = Channel(socket.socket(fileno=sock_fd))
    setup = channel.receive()
    try:
        stream = start(setup)
    except EngineError as error:
        return channel.send({"kind": "broken", "error": str(error)})
    limits = stream.limits
    channel.send({"kind": "ready", "max_len": limits.max_len, "vocab": limits.vocab})
    try:
        Engine(channel, stream).run()
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


class Engine:
    """Takes messages in and gives results out, a step of vLLM at a time."""

    def __init__(self, channel: Any, stream: Any) -> None:
        self._channel, self._stream = channel, stream
        self._scored: set[int] = set()

    def run(self) -> None:
        """Until the server goes away (EOFError) or vLLM breaks (EngineError)."""
        while True:
            wait_s = 0.0 if self._stream.unfinished else IDLE_S
            while self._channel.ready(wait_s):
                self._take(self._channel.receive())
                wait_s = 0.0
            if self._stream.unfinished:
                for output in self._stream.step():
                    self._give(output)

    def _take(self, message: dict[str, Any]) -> None:
        from rlalign.rollout.engine import EngineError

        kind = message["kind"]
        if kind == "abort":
            return self._stream.abort([str(seq) for seq in message["seqs"]])
        try:
            if kind == "update":
                return self._update(message["path"], message["version"])
            self._add(message)
        except EngineError as error:
            self._stream.check_usable()  # raises where vLLM's state is lost
            answer = {"kind": "refused"} if kind == "update" else failed(message["seq"])
            self._channel.send(answer | {"error": str(error)})

    def _update(self, path: str | None, version: int) -> None:
        if path is None:
            got = self._stream.reset_weights()
        else:
            got = self._stream.update_weights(read_weights(path), version)
        self._channel.send({"kind": "updated", "digest": got.digest})

    def _add(self, message: dict[str, Any]) -> None:
        from rlalign.rollout.engine import SamplingParams

        stream, seq, ids = self._stream, message["seq"], message["ids"]
        if message["kind"] == "score":
            stream.limits.check_ids(ids, 0, "the sequence to score")
            self._scored.add(seq)
            return stream.add(str(seq), ids[:-1], stream.scoring(ids[-1]))
        params = SamplingParams(**message["params"])
        stream.limits.check_params(params)
        stream.limits.check_ids(ids, params.max_completion_length, "the prompt")
        stream.limits.check_seeds([message["seed"]], "the request")
        stream.add(str(seq), ids, stream.sampling(params, message["seed"]))

    def _give(self, output: Any) -> None:
        from rlalign.rollout.vllm_stream import sequence_logp

        seq = int(output.request_id)
        if seq in self._scored:
            self._scored.remove(seq)
            return self._channel.send({"kind": "done", "seq": seq, "logp": sequence_logp(output)})
        completion = output.outputs[0]
        logp = list(completion.logprobs.logprobs)
        if not math.isfinite(sum(logp)):
            error = "the model's logits are not finite: the weights diverged"
            return self._channel.send(failed(seq) | {"error": error})
        self._channel.send(
            {
                "kind": "done",
                "seq": seq,
                "ids": list(completion.token_ids),
                "logp": logp,
                "finish": completion.finish_reason,
                "version": self._stream.version.version,
            }
        )


def failed(seq: int) -> dict[str, Any]:
    return {"kind": "failed", "seq": seq}


def read_weights(folder: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of every safetensors file of `folder`, mapped and not copied."""
    from safetensors import SafetensorError, safe_open

    from rlalign.rollout.engine import EngineError

    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is not a mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{path.name} of the update cannot be read: {error}") from error


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
