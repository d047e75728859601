"""An engine that says what it is told, for tests of what is asked and what is made of the reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Choose, Draw, Drawn, Reply, Request


class ScriptedEngine:
    """`say(text before, seed)` is the continuation of a `Draw`; of a `Choose`, whether its first
    option is the likelier one. The tokenizer has one token a byte."""

    def __init__(
        self,
        say: Callable[[str, int], str] = lambda text, seed: "",
        prefer: Callable[[str], bool] = lambda text: True,
        max_len: int = 8192,
    ) -> None:
        self.tokenizer = build_tokenizer(max_len)
        self.eos_ids = frozenset({self.tokenizer.eos_token_id})
        self.limits = Limits(len(self.tokenizer), max_len)
        self.rounds: list[list[str]] = []  # what was asked, as text
        self.requests: list[Request] = []
        self._say, self._prefer = say, prefer

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        self.requests += requests
        self.rounds.append([self._text(request) for request in requests])
        return [self._reply(request) for request in requests]

    def _text(self, request: Request) -> str:
        assert isinstance(request, (Draw, Choose))
        return self.tokenizer.decode(request.ids)

    def _reply(self, request: Request) -> Reply:
        if isinstance(request, Choose):
            good = self._prefer(self._text(request))
            return (-0.1, -2.0) if good else (-2.0, -0.1)
        assert isinstance(request, Draw)
        ids = self.tokenizer(self._say(self._text(request), request.seed))["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id]
        limit = request.params.max_completion_length
        finish = "stop" if len(ids) <= limit else "length"
        kept = tuple(ids[:limit])
        return Drawn(kept, (0.0,) * len(kept), finish)
