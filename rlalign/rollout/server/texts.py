"""Text to token ids and back, off the event loop.

A tokenizer is not made for several threads at once, so it has one of its own; what is asked of it
waits in line there, behind the loading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from rlalign.rollout.engine import EngineError

T = TypeVar("T")
INCOMPLETE = "\ufffd"  # what a part of a character decodes to


@dataclass(frozen=True)
class Text:
    """A completion of `num_tokens` tokens; `pieces[i]`, where they were wanted, is what its token i
    adds to the text. `stopped`: a stop string ended it."""

    text: str
    num_tokens: int
    pieces: tuple[str, ...] = ()
    stopped: bool = False


class Texts:
    """The tokenizer in the folder `model`; close it in the end."""

    def __init__(self, model: str) -> None:
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._loading = self._thread.submit(_load, model)

    async def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of bare texts, with what the tokenizer adds by itself."""
        return await self._run(lambda: self._tokenizer(list(prompts))["input_ids"])

    async def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks.

        Raises EngineError where there is no chat template, or it refuses the messages.
        """
        return await self._run(lambda: _encode_chat(self._tokenizer, messages))

    async def decode(self, ids: Sequence[int], stop: Sequence[str], by_token: bool) -> Text:
        """The text of a completion, cut where the first of the strings `stop` begins. Without
        either, and unless it is wanted `by_token`, it comes without pieces, and faster."""
        if stop or by_token:
            return await self._run(lambda: cut(pieces(self._tokenizer, ids), stop))
        return await self._run(lambda: Text(_decoded(self._tokenizer, ids), len(ids)))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def _tokenizer(self) -> Any:
        return self._loading.result()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[str, str]]:
    """For each token: what it adds to the text, and what would be added if it were the last.

    A character can be made of several tokens, and the first word of a text can lose its blank, so
    each token is decoded with those since the last whole character, and these with the ones before.
    """
    start = read = 0
    for end in range(1, len(ids) + 1):
        known, text = (_decoded(tokenizer, ids[start:to]) for to in (read, end))
        if len(text) > len(known) and not text.endswith(INCOMPLETE):
            start, read = read, end
            yield text[len(known) :], ""
        else:
            yield "", text[len(known) :]


def cut(parts: Iterator[tuple[str, str]], stop: Sequence[str]) -> Text:
    """The text up to the first of `stop`, with the tokens up to the one that completes it."""
    taken: list[str] = []
    text, tail, longest = "", "", max(map(len, stop), default=0)
    for piece, rest in parts:
        tail = rest
        begin = max(0, len(text) - longest + 1)
        text += piece
        taken.append(piece)
        found = min((i for s in stop if (i := text.find(s, begin)) >= 0), default=-1)
        if found >= 0:
            return Text(text[:found], len(taken), _shortened(taken, found), stopped=True)
    return Text(text + tail, len(taken), (*taken[:-1], *(piece + tail for piece in taken[-1:])))


def _shortened(taken: list[str], length: int) -> tuple[str, ...]:
    """As many pieces with `length` characters in all."""
    kept = []
    for piece in taken:
        kept.append(piece[:length])
        length -= len(kept[-1])
    return tuple(kept)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if not tokenizer.chat_template:
        raise EngineError(
            "the model's tokenizer has no chat template: use /v1/completions, or serve an "
            "instruction-tuned model"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise EngineError(f"the model's chat template refuses the messages: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _load(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
