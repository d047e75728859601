"""Many tensors in a few safetensors files, written and read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

FILE_BYTES = 2**28


class TensorWriter:
    """Collects tensors and writes a file whenever they reach `file_bytes` (one tensor at least)."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._index: dict[str, str] = {}
        self._num_files = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        self._pending[key] = tensor.contiguous()
        if sum(t.nbytes for t in self._pending.values()) >= self._file_bytes:
            self._flush()

    def close(self) -> dict[str, str]:
        """Write what is left; returns the file name of every tensor."""
        if self._pending:
            self._flush()
        return self._index

    def _flush(self) -> None:
        name = f"tensors_{self._num_files:05d}.safetensors"
        safetensors.torch.save_file(self._pending, self._folder / name)
        self._index |= dict.fromkeys(self._pending, name)
        self._pending = {}
        self._num_files += 1


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of a `TensorWriter`'s index, each read from its file when asked for."""

    def __init__(self, folder: Path, index: Mapping[str, str]) -> None:
        self._folder = folder
        self._index = index

    def __getitem__(self, key: str) -> torch.Tensor:
        with safe_open(self._folder / self._index[key], framework="pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)
