"""How weights reach an engine in another process, and what each way can do.

| channel | where | how |
|---|---|---|
| `memory` | the server's machine | safetensors files in the job's private folder, in memory |
| `upload` | anywhere | the same files, over HTTP |
| `gloo`, `nccl` | anywhere that both sides trust | a broadcast in a process group of two |
| `ipc` | the server's machine | handles of the trainer's own memory, on a CPU or a GPU; no copy |

Engines in this process (`hf`, `vllm`) take the tensors themselves. A sender is a `WeightChannel`;
the engine's process has a `receive.Receiver`. Whatever the channel, the reader computes the digest
(staging.py) and the trainer compares it with what it sent (trainer/publish.py). LoRA adapters go
through `memory` and `upload`. After the engine died, what came through files is read again; what
came through another channel has to be sent again (`WeightsLost`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

Weights = Iterable[tuple[str, torch.Tensor]]
Receipt = dict[str, Any]  # version and digest
Post = Callable[[dict[str, Any]], Receipt]  # tell the server of an update; EngineError if refused


class WeightChannel(Protocol):
    """The trainer's end."""

    def send(self, weights: Weights, version: int, post: Post) -> Receipt:
        """Hand `weights` over, `post` where they are found, and return the answer.

        A tensor may be freed as soon as the next one is asked for, unless the channel says
        otherwise. Raises what `post` raises, and EngineError where the channel itself fails.
        """
        ...

    def close(self) -> None: ...
