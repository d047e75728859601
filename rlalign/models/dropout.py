"""Dropout is off wherever policies are compared: a ratio of two random forward passes means
nothing."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def without_dropout(model: M) -> M:
    """`model`, its dropout set to 0; train mode (checkpointing, adapters) stays possible."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model
