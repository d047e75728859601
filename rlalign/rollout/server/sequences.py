"""What the server has in hand: sequences on their way, weights in use, and what was done so far."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlalign.errors import RlalignError


class Refused(RlalignError):
    """The engine refused a sequence or an update; nothing else is affected."""


@dataclass(eq=False)
class Sequence:
    """One sequence to draw or score, and where its result goes; with "partial" in the message, also
    what is drawn so far."""

    job: str
    message: dict[str, Any]  # for the engine, without its number
    tokens: int  # what it may cost
    result: asyncio.Future[dict[str, Any]]
    attempts: int = 0
    number: int = -1
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    version: int | None = None  # of the last token
    heard: int = 0  # tokens of the attempt that runs
    on_growth: Callable[[], None] | None = None

    def begin(self, number: int) -> None:
        """Another attempt, under this number."""
        self.number, self.heard = number, 0
        self.attempts += 1

    def grow(self, ids: list[int], logp: list[float], version: int | None) -> bool:
        """Take in what this attempt drew since. False: a former one had drawn something else."""
        known = self.ids[self.heard : self.heard + len(ids)]
        if ids[: len(known)] != known:
            return False
        self.heard += len(ids)
        if len(ids) > len(known):
            self.ids += ids[len(known) :]
            self.logp += logp[len(known) :]
            self.version = version
            if self.on_growth is not None:
                self.on_growth()
        return True

    def end(self, message: dict[str, Any]) -> bool:
        """Take in the rest. False: a former attempt had drawn something else, or more; that is the
        update's doing where it aborted this one."""
        if not self.message.get("partial"):
            return True
        spans, new = message["spans"], slice(self.heard, None)
        version = spans[-1][1] if spans else None
        same = self.grow(message["ids"][new], message["logp"][new], version)
        return same and (self.heard == len(self.ids) or message["finish"] == "abort")


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
