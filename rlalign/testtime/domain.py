"""What `rlalign decode reflect` needs of a domain, and the domains that come with rlalign."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rlalign.models.building import Progress
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.problem import Problem
from rlalign.testtime.reflect import Reflector, ReflectResult

DOMAINS = {
    "sudoku": "rlalign.testtime.reflect_sudoku:SudokuDomain",
    "driving": "rlalign.testtime.reflect_driving:DrivingDomain",
}


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A problem and what it was made from: a puzzle, a scene."""

    problem: Problem
    source: Any


class Domain(Protocol):
    """Problems of one kind, who solves them, and how they are shown."""

    OPTIONS: Mapping[str, Any]  # what its constructor takes, with the defaults
    OWN: frozenset[str]  # those that only shape problems of its own
    reflector: Reflector

    def make(self, index: int) -> Item:
        """Problem `index` (0, 1, ...) of its own."""
        ...

    def read(self, row: Mapping[str, Any], name: str) -> Item:
        """The problem of a line of input, called `name` unless it has an `id`. Raises TaskError for
        a line that has none."""
        ...

    def describe(self, item: Item, ids_T: Tensor) -> Any:
        """A sequence as people read it; JSON."""
        ...

    def describe_unit(self, tokens: Sequence[int]) -> Any:
        """The tokens of one unit as people read them; JSON."""
        ...

    def measure(self, item: Item, ids_T: Tensor) -> dict[str, float]:
        """What the verifier of the repair does not see."""
        ...

    def picture(self, item: Item, result: ReflectResult) -> str:
        """HTML of the draft beside the result, without external resources."""
        ...


def open_domain(
    name: str,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Domain:
    """The domain with its model, which may be built now. `overrides` are key=value options of
    `ReflectConfig`, `options` the domain's own.

    Raises DecodeError for an unknown domain or option, ConfigError for a wrong override, and what
    building raises.
    """
    if name not in DOMAINS:
        raise DecodeError(f"there is no domain {name!r}; built in: {', '.join(DOMAINS)}")
    module, _, kind = DOMAINS[name].partition(":")
    domain = getattr(importlib.import_module(module), kind)
    unknown = sorted(set(options or ()) - set(domain.OPTIONS))
    if unknown:
        raise DecodeError(
            f"{name} has no option {unknown[0]!r}; its own are {', '.join(domain.OPTIONS)}"
        )
    return domain(overrides, progress, **{**domain.OPTIONS, **(options or {})})


def item_name(row: Mapping[str, Any], name: str) -> str:
    """The `id` of a row, or `name`."""
    return str(row.get("id", name))
