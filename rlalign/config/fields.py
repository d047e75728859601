"""Config fields: a default with a sentence and the range or choices that `config.load` enforces."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A config field: its default, a sentence, and the range or choices that `config.load`
    enforces."""
    rules = {"doc": doc, "ge": ge, "le": le, "gt": gt, "choices": choices}
    metadata = {key: value for key, value in rules.items() if value is not None}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: _fresh(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _fresh(default: Any) -> Any:
    return default() if isinstance(default, type) else type(default)(default)


def section(kind: type, doc: str) -> Any:
    return dataclasses.field(default_factory=kind, metadata={"doc": doc})
