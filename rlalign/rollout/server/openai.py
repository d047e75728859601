"""OpenAI's routes for completions, so that programs which speak to its API can sample from the
policy that is being trained.

A model is the served one, under whatever weights a full job has given it, or a job with an
adapter. What names no job shares the engine with the jobs as one more of them. NAME@METHOD is a
test-time method on one of them (openai_search.py).
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.limits import Limits
from rlalign.rollout.seeds import sample_seed
from rlalign.rollout.server.answers import UnknownModel
from rlalign.rollout.server.connected import Stream
from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.jobs import JobTable
from rlalign.rollout.server.methods import SEPARATOR, Methods
from rlalign.rollout.server.openai_bodies import ChatBody, CompletionBody
from rlalign.rollout.server.openai_format import ChatFormat, Choice, CompletionFormat, Format
from rlalign.rollout.server.openai_search import SearchedAnswers
from rlalign.rollout.server.openai_stream import events
from rlalign.rollout.server.searches import Lease, Searches
from rlalign.rollout.server.sequences import Refused, Sequence
from rlalign.rollout.server.streams import as_they_come, outcome
from rlalign.rollout.server.texts import Texts

JOB = "openai"  # in the queue; no lease has such an id


class OpenAi:
    """The handlers. `model` is the name of the served model."""

    def __init__(
        self,
        host: EngineHost,
        jobs: JobTable,
        texts: Texts,
        model: str,
        searches: Searches,
        methods: Methods | None,
    ) -> None:
        self._host, self._jobs, self._texts, self._model = host, jobs, texts, model
        self._methods = methods
        self._searched = None if methods is None else SearchedAnswers(searches, methods)
        self._began = int(time.time())

    async def models(self, request: Request) -> Any:
        methods = [] if self._methods is None else self._methods.names()
        names = self._names()
        searched = [f"{name}{SEPARATOR}{method}" for name in names for method in methods]
        return {"object": "list", "data": [self._described(name) for name in names + searched]}

    async def retrieve(self, request: Request) -> Any:
        model = request.path_params["model"]
        self._job(self._parts(model)[0])
        return self._described(model)

    async def completions(self, request: Request) -> Any:
        body = CompletionBody.model_validate_json(await request.body())
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        encoded = iter(await self._texts.encode(texts) if texts else ())
        prompts: list[tuple[list[int], str | None]] = [
            (next(encoded), p) if isinstance(p, str) else (p, None) for p in body.prompt
        ]
        return await self._answer(request, body, prompts, CompletionFormat(body.model))

    async def chat(self, request: Request) -> Any:
        body = ChatBody.model_validate_json(await request.body())
        messages = [message.plain for message in body.messages]
        prompt = await self._texts.encode_chat(messages), messages[-1]["content"]
        return await self._answer(request, body, [prompt], ChatFormat(body.model))

    # --- what they stand on ----------------------------------------------------------------------

    async def _answer(
        self,
        request: Request,
        body: CompletionBody | ChatBody,
        prompts: list[tuple[list[int], str | None]],
        form: Format,
    ) -> Response | dict[str, Any]:
        name, method = self._parts(body.model)
        job = self._job(name)
        if method and self._searched is not None:
            lease = Lease(job, lambda: job == JOB or self._jobs.get(job))
            return await self._searched.answer(request, body, lease, method, prompts, form)
        if body.testtime is not None:
            raise Refused(
                f"testtime goes with a method in the model's name: {name}{SEPARATOR}METHOD"
            )
        return await self._plain(request, body, job, [ids for ids, _ in prompts], form)

    async def _plain(
        self,
        request: Request,
        body: CompletionBody | ChatBody,
        job: str,
        prompts: list[list[int]],
        form: Format,
    ) -> Response | dict[str, Any]:
        sequences = self._submit(body, job, prompts)
        prompt_tokens = sum(map(len, prompts))
        if body.stream:
            told = events(self._host, self._texts, form, body, sequences, prompt_tokens)
            return Stream(told, lambda: self._host.cancel(sequences), "text/event-stream")
        async with contextlib.aclosing(as_they_come(self._host, sequences)) as batches:
            async for batch in batches:
                for sequence in batch:
                    outcome(sequence)  # the first that failed speaks for all
                if await request.is_disconnected():
                    raise ClientDisconnect
        choices, tokens = [], 0
        for i, sequence in enumerate(sequences):
            done = outcome(sequence)
            text = await self._texts.decode(done["ids"], body.stop, body.logp_wanted)
            tokens += text.num_tokens
            logp = done["logp"][: text.num_tokens] if body.logp_wanted else None
            finish = "stop" if text.stopped else done["finish"]
            version = done["spans"][-1][1] if done["spans"] else None
            choices.append(Choice(i, text, logp, finish, version))
        return form.whole(choices, prompt_tokens, tokens)

    def _submit(
        self, body: CompletionBody | ChatBody, job: str, prompts: list[list[int]]
    ) -> list[Sequence]:
        """Queue `n` sequences of each prompt. Raises EngineError for what the engine cannot do, and
        TooMany."""
        limits = Limits(self._host.limits["vocab"], self._host.limits["max_len"])
        seed = secrets.randbits(63) if body.seed is None else body.seed
        ready = []
        for i, ids in enumerate(prompts):
            longest = body.longest or max(1, limits.max_len - len(ids))
            params = {
                "max_completion_length": longest, "temperature": body.temperature,
                "top_p": body.top_p, "top_k": body.top_k,
                "stop_token_ids": body.stop_token_ids, "ignore_eos": body.ignore_eos,
            }  # fmt: skip
            limits.check_params(SamplingParams(**params))
            limits.check_ids(ids, longest, f"prompt {i}")
            message = {"kind": "draw", "ids": ids, "params": params, "partial": body.stream}
            for j in range(body.n):
                ready.append(({**message, "seed": sample_seed(seed, str(i), j, 0)}, longest))
        return self._host.submit(job, [(m, len(m["ids"]) + longest) for m, longest in ready])

    def _parts(self, model: str) -> tuple[str, str]:
        """The model's own name, and the method's; empty: none."""
        name, _, method = model.rpartition(SEPARATOR)
        ours = self._methods is not None and self._methods.knows(method)
        named = {self._model, *(x for job in self._jobs for x in (job.id, job.name))}
        return (name, method) if ours and model not in named else (model, "")

    def _job(self, model: str) -> str:
        """Under which job's name a request for `model` runs. Raises UnknownModel with those there
        are."""
        if model == self._model:
            return JOB
        adapted = [job for job in self._jobs if job.kind == "lora"]
        found = [job for job in adapted if job.id == model]
        found = found or [job for job in adapted if job.name == model]
        if len(found) == 1:
            return found[0].id
        what = f"{len(found)} jobs are called" if found else "there is no model"
        methods = "" if self._methods is None else ", ".join(self._methods.names())
        raise UnknownModel(
            f"{what} {model!r}; choose one of {', '.join(self._names())}"
            + (
                f", alone or as NAME{SEPARATOR}METHOD, with METHOD one of {methods}"
                if methods
                else ""
            )
        )

    def _described(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": self._began, "owned_by": "rlalign"}

    def _names(self) -> list[str]:
        """Of the models: jobs with an adapter by name, by id where others have the name too."""
        adapted = [job for job in self._jobs if job.kind == "lora"]
        count = Counter([self._model, *(job.name for job in adapted)])
        return [self._model, *(j.name if count[j.name] == 1 else j.id for j in adapted)]
