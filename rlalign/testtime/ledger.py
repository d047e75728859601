"""What a search costs, and how much it may."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rlalign.rollout.search import Choose, Draw, Drawn, Latents, Rate, Request, Search
from rlalign.types import FINISH_LENGTH


class Ledger:
    """The account of one search: every round goes through `ask`.

    `max_tokens` bounds the tokens generated, those of a self-reward included; `max_wall_s` the
    seconds since the search began; 0: no bound. A search looks at `over` before it asks for more
    and ends with the best that it has.
    """

    def __init__(self, *, max_tokens: int = 0, max_wall_s: float = 0.0) -> None:
        self._max_tokens, self._max_wall_s = max_tokens, max_wall_s
        self._began = time.monotonic()
        self.was_cut = False  # `max_tokens` ended a draw that would have gone on
        self.num_generated_tokens = 0
        self.num_prefill_tokens = 0  # of prompts sent, whether or not a cache held them
        self.num_engine_calls = 0
        self.num_reward_calls = 0  # texts that were scored, by the model itself or otherwise
        self.counters: Counter[str] = Counter()  # what else a method counts
        self.reward_error = ""  # the first that a reward gave in place of a score

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._began

    def over(self) -> str:
        """The budget that is used up, by its name; "": none."""
        if self.was_cut or (self._max_tokens and self.num_generated_tokens >= self._max_tokens):
            return "max_tokens"
        if self._max_wall_s and self.wall_s >= self._max_wall_s:
            return "max_wall_s"
        return ""

    def left(self, wanted: int) -> int:
        """How many of `wanted` tokens may still be generated; at least 1."""
        if not self._max_tokens:
            return wanted
        return max(1, min(wanted, self._max_tokens - self.num_generated_tokens))

    def cuts(self, drawn: Iterable[Drawn], allowed: int, wanted: int) -> bool:
        """Whether draws that got `allowed` tokens in place of `wanted` were cut off by the budget,
        which is then used up."""
        cut = allowed < wanted and any(one.finish == FINISH_LENGTH for one in drawn)
        self.was_cut = self.was_cut or cut
        return cut

    def ask(self, requests: Sequence[Request]) -> Search[list[Any]]:
        """The replies to a round, which is entered into the account."""
        if not requests:
            return []
        replies = yield requests
        for request, reply in zip(requests, replies, strict=True):
            self._enter(request, reply)
        return replies

    def note_failed_reward(self, detail: str) -> None:
        """A text that could not be scored; how many there are is `counters.failed_rewards`."""
        self.counters["failed_rewards"] += 1
        self.reward_error = self.reward_error or detail

    def _enter(self, request: Request, reply: Any) -> None:
        if isinstance(request, Rate):
            self.num_reward_calls += 1
            return
        self.num_engine_calls += 1
        if isinstance(request, (Draw, Choose, Latents)):
            self.num_prefill_tokens += len(request.ids)
        if isinstance(reply, Drawn):
            self.num_generated_tokens += len(reply.ids)
