"""Weights as handles of the trainer's own memory: nothing is copied until the engine reads it.

On a GPU these are CUDA's IPC handles; on a CPU the weights are moved to shared memory when they are
first sent and live there from then on. torch's own handles travel as text, so nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rlalign.rollout.channels import Post, Receipt, Weights
from rlalign.rollout.engine import EngineError


class IpcChannel:
    """Tensors are kept alive, and must not change, until the server has answered."""

    def send(self, weights: Weights, version: int, post: Post) -> Receipt:
        kept: list[torch.Tensor] = []
        storages: dict[int, int] = {}  # place in the list, by address
        announced: dict[str, Any] = {"channel": "ipc", "storages": [], "tensors": []}
        for name, tensor in weights:
            value = tensor.detach()
            kept.append(value)
            address = value.untyped_storage().data_ptr()
            if address not in storages:
                announced["storages"].append(_handle(value))
                storages[value.untyped_storage().data_ptr()] = len(storages)
            announced["tensors"].append(
                {
                    "name": name,
                    "dtype": str(value.dtype).removeprefix("torch."),
                    "shape": list(value.shape),
                    "stride": list(value.stride()),
                    "offset": value.storage_offset(),
                    "storage": storages[value.untyped_storage().data_ptr()],
                }
            )
        receipt = post(announced)
        kept.clear()
        return receipt

    def close(self) -> None: ...


def receive(source: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of an update that `IpcChannel.send` announced."""
    try:
        storages = [_open(handle) for handle in source["storages"]]
        tensors = [
            (described["name"], _view(storages, described)) for described in source["tensors"]
        ]
    except (
        RuntimeError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:  # not torch's
        raise EngineError(f"the weights' memory cannot be opened: {error}") from error
    yield from tensors


def _view(storages: list[Any], described: dict[str, Any]) -> torch.Tensor:
    storage = storages[described["storage"]]
    tensor = torch.empty(0, dtype=getattr(torch, described["dtype"]), device=storage.device)
    return tensor.set_(storage, described["offset"], described["shape"], described["stride"])


def _handle(tensor: torch.Tensor) -> list[Any]:
    """torch's handle of a tensor's storage, bytes as hexadecimal text."""
    storage: Any = tensor.untyped_storage()
    parts = storage._share_cuda_() if tensor.is_cuda else storage._share_filename_cpu_()
    return [part.hex() if isinstance(part, bytes) else part for part in parts]


def _open(handle: list[Any]) -> Any:
    cpu = len(handle) == 3  # (manager, name, size); of a GPU there are eight parts
    parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in handle]
    if cpu:
        return torch.UntypedStorage._new_shared_filename_cpu(*parts)
    return torch.UntypedStorage._new_shared_cuda(*parts)
