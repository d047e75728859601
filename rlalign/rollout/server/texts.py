"""Text to token ids and back, off the event loop.

A tokenizer is not made for several threads at once, so it has one of its own; what is asked of it
waits in line there, behind the loading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
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
        self.folder = model
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._loading = self._thread.submit(load_tokenizer, model)

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
        return await self._run(lambda: read_whole(self._tokenizer, ids, stop, by_token))

    async def readers(self, count: int, stop: Sequence[str]) -> list[Reader]:
        """For as many completions that are read while they grow."""
        return await self._run(lambda: [Reader(self._tokenizer, stop) for _ in range(count)])

    async def read(self, grown: Sequence[tuple[Reader, Sequence[int], bool]]) -> list[Text]:
        """What new tokens add to the texts of their readers; with True, they are the last."""
        return await self._run(lambda: [reader.read(ids, last) for reader, ids, last in grown])

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def _tokenizer(self) -> Any:
        return self._loading.result()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def read_whole(tokenizer: Any, ids: Sequence[int], stop: Sequence[str], by_token: bool) -> Text:
    """As Texts.decode. What is no text comes out as it does token by token, for the tokenizers that
    judge by what stands next to it (ByteFallback)."""
    if not (stop or by_token):
        text = _decoded(tokenizer, ids)
        if INCOMPLETE not in text:
            return Text(text, len(ids))
    return Reader(tokenizer, stop).read(ids, last=True)


class Reader:
    """Reads a completion as it grows: however its tokens are dealt out, the texts that it gives
    make up the same one.

    A token is held back while what it adds may still change: it is a part of a character, or may
    be the beginning of one of the strings `stop`.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._longest = max(map(len, stop), default=0)
        self._ids: list[int] = []  # the last that made up whole characters, and those since
        self._whole = 0  # how many of them did
        self._held: list[str] = []  # pieces of tokens that were not given yet
        self._text = ""  # which they make up
        self._rest = ""  # what would come after it if there were no more tokens

    def read(self, ids: Sequence[int], last: bool) -> Text:
        """What is certain now; with `last`, all there is. After a stop string nothing is read."""
        text, begin = self._text, 0  # a stop string begins behind what was given
        for token in ids:
            piece = self._piece(token)
            text += piece
            self._held.append(piece)
            found = min((i for s in self._stop if (i := text.find(s, begin)) >= 0), default=-1)
            if found >= 0:
                return Text(text[:found], len(self._held), _shortened(self._held, found), True)
            begin = max(0, len(text) - self._longest + 1)
        if last:
            ends = (piece + self._rest for piece in self._held[-1:])
            return Text(text + self._rest, len(self._held), (*self._held[:-1], *ends))
        given = self._certain(text)
        whole = Text("".join(given), len(given), tuple(given))
        self._text, self._held = text[len(whole.text) :], self._held[len(given) :]
        return whole

    def _piece(self, token: int) -> str:
        """What a token adds to the text, and into `_rest` what is left open.

        A character can be made of several tokens, and the first word of a text can lose its blank,
        so each token is decoded with those since the last whole character, and these with the ones
        before.
        """
        self._ids.append(token)
        known, text = _decoded(self._tokenizer, self._ids[: self._whole]), self._decoded()
        if len(text) > len(known) and not text.endswith(INCOMPLETE):
            self._ids, self._rest = self._ids[self._whole :], ""
            self._whole = len(self._ids)
            return text[len(known) :]
        self._rest = text[len(known) :]
        return ""

    def _certain(self, text: str) -> list[str]:
        """The pieces that neither another token nor a stop string changes."""
        ahead = range(max(0, len(text) - self._longest + 1), len(text))
        certain = next((i for i in ahead if any(s.startswith(text[i:]) for s in self._stop)), None)
        left = len(text) if certain is None else certain
        count = 0
        for i, piece in enumerate(self._held, 1):
            left -= len(piece)
            if left < 0:
                break
            count = i if piece else count  # one without a piece belongs to the character it begins
        return self._held[:count]

    def _decoded(self) -> str:
        return _decoded(self._tokenizer, self._ids)


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


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
