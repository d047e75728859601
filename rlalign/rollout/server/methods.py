"""Test-time methods as the server knows them: names, and searches that begin with a prompt.

The methods themselves lie above the server (rlalign/testtime), which is given a `Methods`. A model
called NAME@METHOD is one of them on the model NAME.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Search

SEPARATOR = "@"


@dataclass(frozen=True)
class ServedModel:
    """What a search may know of the engine: a `SearchEngine` without `answer`, which is the
    server's part."""

    tokenizer: Any
    eos_ids: frozenset[int]
    limits: Limits


@dataclass(frozen=True)
class Asked:
    """One prompt of a request. `text` is the question as people read it (None: the decoded `ids`),
    `options` what the client wants of the method: a mapping of JSON values, to be distrusted.

    >>> Asked("0", (5, 9), "84-9+8=?", {"seed": 3, "max_new_tokens": 64, "num_samples": 4})
    """

    id: str
    ids: tuple[int, ...]
    text: str | None
    options: Mapping[str, Any]


@dataclass
class Progress:
    """What a search has done so far."""

    rounds: int = 0
    num_generated_tokens: int = 0
    best_reward: float | None = None
    versions: set[int] = field(default_factory=set)  # of the policy, that drew something

    def scored(self, reward: float) -> None:
        """Take in the reward of another answer; NaN is none."""
        if reward == reward and (self.best_reward is None or reward > self.best_reward):
            self.best_reward = reward

    def to_json(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds, "num_generated_tokens": self.num_generated_tokens,
            "best_reward": self.best_reward,
        }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """An answer. `finish` is "stop", "length" or the name of the budget that ended the search;
    `account`, as JSON, is what it cost and how it went."""

    text: str
    num_tokens: int
    finish: str
    num_generated_tokens: int
    account: dict[str, Any]


class Methods(Protocol):
    def names(self) -> list[str]:
        """Those to show; of a method with a number in its name, one example."""
        ...

    def knows(self, name: str) -> bool: ...

    def begin(
        self, name: str, model: ServedModel, asked: Asked, progress: Progress
    ) -> Search[Found]:
        """A search for an answer, which tells `progress` of rewards. May take a while. Raises
        RlalignError for options that are wrong."""
        ...

    def close(self) -> None: ...
