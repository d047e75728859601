"""An answer in OpenAI's format as a stream of events, which tell of the text as it comes.

Of each choice is said what is new since the last look. A reader that is slow is told more at a
time, and nothing is kept for it but what has been drawn.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from rlalign.errors import RlalignError
from rlalign.rollout.server.answers import status_of
from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.openai_bodies import ChatBody, CompletionBody
from rlalign.rollout.server.openai_format import Choice, Format, refusal
from rlalign.rollout.server.sequences import Sequence
from rlalign.rollout.server.streams import as_they_come, outcome
from rlalign.rollout.server.texts import Reader, Text, Texts


@dataclass(eq=False)
class Unfinished:
    """A choice that was told in part."""

    index: int
    reader: Reader
    read: int = 0  # tokens of the sequence
    tokens: int = 0  # that were told
    characters: int = 0

    def unread(self, sequence: Sequence, last: bool) -> tuple[Reader, list[int], bool]:
        """What the reader gets next."""
        ids, self.read = sequence.ids[self.read :], len(sequence.ids)
        return self.reader, ids, last

    def told(self, sequence: Sequence, text: Text, logp: bool, finish: str | None) -> Choice:
        """The choice with what `text` adds to it; with `logp`, the log-probs of its tokens."""
        drawn = slice(self.tokens, self.tokens + text.num_tokens)
        told = sequence.logp[drawn] if logp else None
        choice = Choice(self.index, text, told, finish, sequence.version, self.characters)
        self.tokens += text.num_tokens
        self.characters += len(text.text)
        return choice


async def events(
    host: EngineHost,
    texts: Texts,
    form: Format,
    body: CompletionBody | ChatBody,
    sequences: list[Sequence],
    prompt_tokens: int,
) -> AsyncIterator[str]:
    """Server-sent events; a comment where there is nothing to say. A failure ends them."""
    tokens = 0
    try:
        async with contextlib.aclosing(_news(host, texts, body, sequences)) as news:
            async for batch in news:
                tokens += sum(choice.text.num_tokens for choice in batch)
                parts = (_event(part) for choice in batch for part in form.parts(choice))
                yield "".join(parts) or ": alive\n\n"
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(form.last(prompt_tokens, tokens))
        yield "data: [DONE]\n\n"
    except (RlalignError, TimeoutError) as error:
        yield _event(refusal(status_of(error), str(error)))


async def _news(
    host: EngineHost, texts: Texts, body: CompletionBody | ChatBody, sequences: list[Sequence]
) -> AsyncGenerator[list[Choice]]:
    """What is new of the choices, batch by batch. A stop string ends its sequence, too."""
    readers = await texts.readers(len(sequences), body.stop)
    unfinished = {s: Unfinished(i, readers[i]) for i, s in enumerate(sequences)}
    async with contextlib.aclosing(as_they_come(host, sequences)) as batches:
        async for batch in batches:
            grown = [(s, unfinished[s]) for s in batch if s in unfinished]
            ended = {s: outcome(s)["finish"] for s, _ in grown if s.result.done()}
            read = await texts.read([choice.unread(s, s in ended) for s, choice in grown])
            choices = []
            for (sequence, choice), text in zip(grown, read, strict=True):
                finish = "stop" if text.stopped else ended.get(sequence)
                if finish is not None:
                    del unfinished[sequence]
                if finish is not None or text.num_tokens:
                    choices.append(choice.told(sequence, text, body.logp_wanted, finish))
            host.cancel(s for s, _ in grown if s not in unfinished and s not in ended)
            yield choices


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
