"""The random states of a process as JSON: Python, NumPy, torch and its GPU."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def capture_random_state() -> dict[str, Any]:
    """The state of every global generator of this process, as JSON can hold it."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": None if cuda is None else _encode(cuda),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every global generator to a state that `capture_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
