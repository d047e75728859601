"""What the server has in hand: sequences on their way, weights in use, and what was done so far."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from rlalign.errors import RlalignError


class Refused(RlalignError):
    """The engine refused a sequence or an update; nothing else is affected."""


@dataclass(eq=False)
class Sequence:
    """One sequence to draw or score, and where its result goes."""

    job: str
    message: dict[str, Any]  # for the engine, without its number
    tokens: int  # what it may cost
    result: asyncio.Future[dict[str, Any]]
    attempts: int = 0
    number: int = -1


@dataclass(frozen=True)
class Update:
    """Weights in use: replayed when the engine is started again."""

    source: dict[str, Any]  # where they came from, for rlalign.rollout.channels
    version: int
    digest: str


@dataclass
class Tally:
    """What a job was given."""

    generated_tokens: int = 0
    sequences: int = 0  # drawn and scored

    def __add__(self, other: Tally) -> Tally:
        tokens = self.generated_tokens + other.generated_tokens
        return Tally(tokens, self.sequences + other.sequences)


@dataclass
class Counters:
    """Since the server started; of the engine, whichever process it is."""

    total: Tally = field(default_factory=Tally)
    by_job: dict[str, Tally] = field(default_factory=dict)  # that is not over
    restarts: int = 0
    updates: int = 0
