"""Answers in OpenAI's format that a test-time method looks for: models called NAME@METHOD.

The client's fields are the method's options where it has such options (`max_tokens` is the longest
answer, its `max_new_tokens`), and refused where they would mean nothing. What was generated and is
not in the answer is in the usage too, as reasoning tokens.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rlalign.errors import RlalignError
from rlalign.rollout.server.answers import status_of
from rlalign.rollout.server.connected import Stream, unless_gone
from rlalign.rollout.server.methods import Asked, Found, Methods, Progress
from rlalign.rollout.server.openai_bodies import ChatBody, CompletionBody
from rlalign.rollout.server.openai_format import Choice, Format, refusal
from rlalign.rollout.server.searches import Lease, Searches
from rlalign.rollout.server.sequences import Refused
from rlalign.rollout.server.texts import Text

PROGRESS_S = 1.0  # between two events of a stream
MAX_SEED = 2**31  # of a method's options
# Fields of a request that a search has no use for, and those that some methods have options for.
MEANINGLESS = ("stop", "stop_token_ids", "ignore_eos")
SAMPLING = ("temperature", "top_p", "top_k")
Body = CompletionBody | ChatBody


@dataclass(eq=False)
class Looking:
    """A search for one choice."""

    index: int
    progress: Progress = field(default_factory=Progress)
    admitted: asyncio.Event = field(default_factory=asyncio.Event)

    def choice(self, found: Found | None = None) -> Choice:
        """The answer, or how far it is."""
        version = max(self.progress.versions, default=None)
        if found is None:
            text, finish, said = Text("", 0), None, self.progress.to_json()
        else:
            text, finish = Text(found.text, found.num_tokens), found.finish
            said = {**found.account, "policy_versions": sorted(self.progress.versions)}
        return Choice(self.index, text, None, finish, version, testtime=said)


class SearchedAnswers:
    def __init__(self, searches: Searches, methods: Methods) -> None:
        self._searches, self._methods = searches, methods

    async def answer(
        self,
        request: Request,
        body: Body,
        lease: Lease,
        method: str,
        prompts: Sequence[tuple[Sequence[int], str | None]],
        form: Format,
    ) -> Response | dict[str, Any]:
        """`prompts` are token ids with the texts that they were. Raises Refused for a request that
        makes no sense, TooMany where the job's queue has no room for it."""
        options = _options(body, method)
        looking = [Looking(i) for i in range(len(prompts))]
        tasks = {
            asyncio.create_task(
                self._look(lease, method, Asked(str(one.index), tuple(ids), text, options), one)
            ): one
            for one, (ids, text) in zip(looking, prompts, strict=True)
        }
        prompt_tokens = sum(len(ids) for ids, _ in prompts)
        try:
            if body.stream:
                await unless_gone(request, _begun(tasks))
                told = self._events(form, body, tasks, prompt_tokens)
                running, tasks = tasks, {}
                return Stream(told, lambda: _cancel(running), "text/event-stream")
            found = await unless_gone(request, _all(tasks))
        finally:
            _cancel(tasks)
        choices = [one.choice(answer) for one, answer in zip(looking, found, strict=True)]
        return form.whole(choices, *_counts(prompt_tokens, found))

    async def _look(self, lease: Lease, method: str, asked: Asked, one: Looking) -> Found:
        return await self._searches.run(
            lease,
            lambda model: self._methods.begin(method, model, asked, one.progress),
            one.progress,
            one.admitted,
        )

    async def _events(
        self,
        form: Format,
        body: Body,
        tasks: dict[asyncio.Task[Found], Looking],
        prompt_tokens: int,
    ) -> AsyncIterator[str]:
        """Server-sent events: how far each search is, and its answer. A failure ends them."""
        left, told = set(tasks), {}
        try:
            while left:
                ended, left = await asyncio.wait(
                    left, timeout=PROGRESS_S, return_when=asyncio.FIRST_COMPLETED
                )
                news = [tasks[task].choice(task.result()) for task in ended]
                for one in (tasks[task] for task in left):
                    if told.get(one) != (said := one.progress.to_json()):
                        told[one] = said
                        news.append(one.choice())
                parts = (_event(part) for choice in news for part in form.parts(choice))
                yield "".join(parts) or ": alive\n\n"
            if body.stream_options is not None and body.stream_options.include_usage:
                found = [task.result() for task in tasks]
                yield _event(form.last(*_counts(prompt_tokens, found)))
            yield "data: [DONE]\n\n"
        except (RlalignError, TimeoutError) as error:
            yield _event(refusal(status_of(error), str(error)))
        finally:
            _cancel(tasks)


def _options(body: Body, method: str) -> dict[str, Any]:
    """What the client wants of the method, wherever it says so."""
    given = body.model_fields_set
    useless = [name for name in MEANINGLESS if getattr(body, name)]
    useless += ["logprobs"] if body.logp_wanted else []
    if useless or body.n != 1:
        raise Refused(
            f"{useless[0] if useless else f'n={body.n}'}: not with {method}, which gives one whole "
            "answer to each prompt; leave it out"
        )
    own = dict(body.testtime or {})
    outer = {name: getattr(body, name) for name in SAMPLING if name in given}
    longest = body.longest if isinstance(body, ChatBody) else body.max_tokens
    if longest is not None:
        outer["max_new_tokens"] = longest
    if body.seed is not None:
        outer["seed"] = body.seed
    twice = sorted(name for name in outer.keys() & own.keys() if outer[name] != own[name])
    if twice:
        raise Refused(f"{twice[0]} is given twice, as {outer[twice[0]]} and in testtime: give one")
    return {"seed": secrets.randbelow(MAX_SEED), **outer, **own}


def _counts(prompt_tokens: int, found: Sequence[Found]) -> tuple[int, int, int]:
    """Tokens of the prompts, those that were generated, and of these those that are not told."""
    generated = sum(answer.num_generated_tokens for answer in found)
    shown = sum(answer.num_tokens for answer in found)
    return prompt_tokens, generated, max(0, generated - shown)


async def _begun(tasks: dict[asyncio.Task[Found], Looking]) -> None:
    """Until each search is in the queue or over; raises what ended one before."""
    waiting = [asyncio.create_task(one.admitted.wait()) for one in tasks.values()]
    try:
        for task, began in zip(tasks, waiting, strict=True):
            await asyncio.wait((task, began), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
    finally:
        for began in waiting:
            began.cancel()


async def _all(tasks: dict[asyncio.Task[Found], Looking]) -> list[Found]:
    return await asyncio.gather(*tasks)


def _cancel(tasks: dict[asyncio.Task[Found], Looking]) -> None:
    for task in tasks:
        if not task.cancel() and not task.cancelled():
            task.exception()  # seen: nobody else will ask


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
