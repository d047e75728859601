"""An engine whose answers are written down, for tests of methods on language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Draw, Drawn, Reply, Request
from rlalign.types import FINISH_LENGTH, FINISH_STOP

EOS = 0


class LetterTokenizer:
    """A token is a character; 0 ends a text."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(token) for token in ids if token != EOS)


class ScriptedEngine:
    """`SearchEngine` of which `say(prompt, seed, temperature)` is what it writes; cut off at the
    tokens asked for. `rounds` are the requests that came together."""

    eos_ids = frozenset({EOS})
    limits = Limits(0x110000, 200)

    def __init__(self, say: Callable[[str, int, float], str]) -> None:
        self.tokenizer = LetterTokenizer()
        self.say = say
        self.rounds: list[list[Request]] = []

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        self.rounds.append(list(requests))
        return [self._one(request) for request in requests if isinstance(request, Draw)]

    def _one(self, draw: Draw) -> Drawn:
        text = self.say(self.tokenizer.decode(draw.ids), draw.seed, draw.params.temperature)
        ids = (*map(ord, text), EOS)[: draw.params.max_completion_length]
        finish = FINISH_STOP if ids[-1] == EOS else FINISH_LENGTH
        return Drawn(ids, (0.0,) * len(ids), finish)


def in_turn(texts: Sequence[str]) -> Callable[[str, int, float], str]:
    """Says each of `texts` once, whatever it is asked."""
    left = list(texts)
    return lambda prompt, seed, temperature: left.pop(0)
