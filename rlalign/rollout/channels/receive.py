"""The engine's end of every channel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rlalign.rollout.channels import ipc
from rlalign.rollout.channels.group import GroupReceiver
from rlalign.rollout.engine import EngineError


class Receiver:
    """Weights from wherever an update says that they are: `device` is the engine's."""

    def __init__(self, device: str) -> None:
        self._group = GroupReceiver(device)

    def receive(self, source: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight, one after the other. EngineError where they cannot be
        had."""
        if source["channel"] == "files":
            return read_files(Path(source["path"]))
        if source["channel"] == "group":
            return self._group.receive(source)
        return ipc.receive(source)


def read_files(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the safetensors files of `folder`, mapped and not copied."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is not a mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{path.name} of the update cannot be read: {error}") from error
