"""The prompts of one split, in memory, and the order in which training takes them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

from rlalign.types import Prompt


@dataclass(frozen=True, slots=True)
class BadRow:
    """>>> BadRow("line 18", "missing prompt", "columns: question, answer")"""

    place: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind} ({self.detail})" if self.detail else self.place


@dataclass(frozen=True)
class LoadReport:
    """What came of the rows of a source."""

    source: str
    num_rows: int
    bad: Mapping[str, int] = field(default_factory=dict)  # kind of problem: number of rows
    examples: Sequence[BadRow] = ()  # the first few

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())

    def __str__(self) -> str:
        """>>> str(report)
        'train.jsonl: 998 of 1000 rows are usable; 2 broken (2 missing prompt): line 4: ...'
        """
        text = f"{self.source}: {self.num_rows - self.num_bad} of {self.num_rows} rows are usable"
        if not self.num_bad:
            return text
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.bad.items()))
        shown = "; ".join(map(str, self.examples))
        more = "; ..." if self.num_bad > len(self.examples) else ""
        return f"{text}; {self.num_bad} broken ({kinds}): {shown}{more}"


class PromptSet(Sequence[Prompt]):
    """Prompts in the order of the source, and a keyed order to train on.

    Training takes prompts from an endless stream, epoch after epoch; `take` is a pure function of
    (seed, position), so a resumed run needs to remember nothing but how many it has taken.
    """

    def __init__(
        self, prompts: Sequence[Prompt], report: LoadReport, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        if not prompts:
            raise ValueError("a PromptSet holds at least one prompt")
        self._prompts = tuple(prompts)
        self.report = report
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        return self._prompts[index]

    def order(self, epoch: int, seed: int | None = None) -> list[int]:
        """The rows of one epoch (0, 1, ...), each once: shuffled by (seed, epoch), or as they
        come. `seed` defaults to the set's own."""
        rows = list(range(len(self)))
        if self.shuffle:
            random.Random(f"order/{self.seed if seed is None else seed}/{epoch}").shuffle(rows)
        return rows

    def take(self, position: int, count: int) -> list[Prompt]:
        """`count` prompts of the stream of epochs, from `position` (0, 1, ...) on.

        Step k of a run with n prompts a step uses take(k * n, n). A prompt comes twice only where
        a batch crosses the border of an epoch.
        """
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, start = divmod(position + len(taken), len(self))
            rows = self.order(epoch)[start : start + count - len(taken)]
            taken += [self._prompts[row] for row in rows]
        return taken

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that any prompt has, `answer` first where there is one."""
        names = {name for prompt in self._prompts for name in prompt.columns}
        answered = any(prompt.answer is not None for prompt in self._prompts)
        return (*(["answer"] if answered else []), *sorted(names - {"answer"}))

    @cached_property
    def digest(self) -> str:
        """16 hex digits over ids, tokens, texts, answers and columns, in the source's order."""
        state = hashlib.sha256()
        for prompt in self._prompts:
            row = [prompt.id, prompt.token_ids, prompt.source, prompt.answer, dict(prompt.columns)]
            state.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return state.hexdigest()[:16]
