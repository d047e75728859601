"""Reinforcement-learning alignment for language, diffusion-language and flow models.

>>> import rlalign
>>> config = rlalign.load_config("configs/grpo/mini.yaml", ["trainer.max_steps=20"])
>>> result = rlalign.train(config)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.api import Result, evaluate, load_config, serve, train
    from rlalign.config import Config, ConfigError

_PUBLIC = {
    "load_config": "rlalign.api",
    "train": "rlalign.api",
    "evaluate": "rlalign.api",
    "serve": "rlalign.api",
    "Result": "rlalign.api",
    "Config": "rlalign.config",
    "ConfigError": "rlalign.config",
}
__all__ = ["Config", "ConfigError", "Result", "evaluate", "load_config", "serve", "train"]


def __getattr__(name: str) -> Any:
    """Names are imported on first use: `import rlalign` alone must not cost a torch import."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rlalign' has no attribute {name!r}; it has {', '.join(__all__)}")
