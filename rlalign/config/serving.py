# ruff: noqa: RUF009  (option() returns dataclass fields)
"""Test-time methods as models of `rlalign serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from rlalign.config.fields import option


@dataclass
class ServedReward:
    """A reward that requests may ask for by name."""

    name: str = option(MISSING, "What requests call it.")
    function: str = option(
        "", "A built-in (docs/rewards.md) or an import path `package.module:function`; empty: name."
    )
    params: dict[str, Any] = option({}, "Keyword arguments of its factory.")
    timeout_s: float = option(60.0, "Deadline of one call, seconds.", gt=0)


@dataclass
class ServeTesttimeConfig:
    """What requests to NAME@METHOD may have."""

    max_search_tokens: int = option(
        262_144, "Tokens that one prompt may cost; a request may ask for a lower budget.", ge=1
    )
    max_search_s: float = option(
        300.0, "Seconds that one prompt may take, looked at between rounds.", gt=0
    )
    rewards: list[ServedReward] = option(
        [], "Rewards that requests may ask for by name; without one the model judges itself."
    )
