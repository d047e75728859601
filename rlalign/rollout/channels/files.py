"""Weights as safetensors files: in the job's folder on the server's machine, or uploaded to it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file

from rlalign.rollout.channels import Post, Receipt, Weights
from rlalign.rollout.engine import EngineError
from rlalign.rollout.vllm_weights import ADAPTER_FILE, ADAPTER_PREFIX

ADAPTER_CONFIG = "adapter_config.json"
Tensors = dict[str, torch.Tensor]


class MemoryChannel:
    """Files in `spool`, a folder that the engine sees. With `adapter`, the content of PEFT's
    adapter_config.json, the weights are a LoRA adapter's."""

    def __init__(self, spool: Path, adapter: dict[str, Any] | None = None) -> None:
        self._spool, self._adapter = spool, adapter

    def send(self, weights: Weights, version: int, post: Post) -> Receipt:
        folder = self._spool / str(version)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with _named(folder):
                folder.mkdir(mode=0o700)
            for name, content in _files(weights, self._adapter):
                with _named(folder):
                    if isinstance(content, bytes):
                        (folder / name).write_bytes(content)
                    else:
                        save_file(content, folder / name)
            return post({"channel": "files"})
        except BaseException:  # what the server has taken is out of our reach
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def close(self) -> None: ...


class UploadChannel:
    """Files sent by `put(version, name, content)`."""

    def __init__(
        self, put: Callable[[int, str, bytes], None], adapter: dict[str, Any] | None = None
    ) -> None:
        self._put, self._adapter = put, adapter

    def send(self, weights: Weights, version: int, post: Post) -> Receipt:
        for name, content in _files(weights, self._adapter):
            self._put(version, name, content if isinstance(content, bytes) else save(content))
        return post({"channel": "files"})

    def close(self) -> None: ...


@contextlib.contextmanager
def _named(folder: Path):
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise EngineError(
            f"weights cannot be written to {folder}: {error}. Make room there; the server still "
            "has the old ones, if the job's lease lasts"
        ) from error


def _files(
    weights: Weights, adapter: dict[str, Any] | None
) -> Iterator[tuple[str, Tensors | bytes]]:
    """(name, content) of each: a weight a file, or an adapter in the two that PEFT writes."""
    if adapter is None:
        for i, (name, tensor) in enumerate(weights):
            yield f"{i:06}.safetensors", {name: _plain(tensor)}
    else:
        yield ADAPTER_CONFIG, json.dumps(adapter).encode()
        yield ADAPTER_FILE, {ADAPTER_PREFIX + name: _plain(tensor) for name, tensor in weights}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
