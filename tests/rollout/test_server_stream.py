"""Streams of text in OpenAI's format over an engine that tells, dies, and draws again as it is told
to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout.server import engine_keeper, streams
from rlalign.rollout.server.sequences import Sequence
from rlalign.rollout.server.streams import as_they_come
from tests.rollout.fake_engine import GONE, FakeProcess, World, body
from tests.rollout.test_server_faults import until

TOKENIZER = build_tokenizer()
TEXT = "a naïve 🙂 of 日本"
IDS = TOKENIZER(TEXT)["input_ids"]
LOGP = [-0.25 * i for i in range(len(IDS))]


class Reading:
    """A stream that is read as it comes, while `may_read` is set."""

    def __init__(self, w: World, path: str = "/v1/completions", **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.writes = 0
        self.may_read = asyncio.Event()
        self.may_read.set()
        wish = {"model": "fake", "stream": True, "max_tokens": 40, **options}
        if path == "/v1/completions":
            wish["prompt"] = [5, 6]
        content = body(json.dumps(wish).encode())
        self.task = asyncio.create_task(w.call("POST", path, content, hear=self._hear))

    async def _hear(self, message: dict[str, Any]) -> None:
        await self.may_read.wait()
        self.writes += 1
        for line in message.get("body", b"").decode().splitlines():
            if line.startswith("data: {"):
                self.events.append(json.loads(line.removeprefix("data: ")))

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for event in self.events for choice in event.get("choices", ())]

    @property
    def text(self) -> str:
        return "".join(choice["text"] for choice in self.choices)

    @property
    def finish(self) -> str | None:
        return self.choices[-1]["finish_reason"] if self.choices else None


class Script:
    """The engine's sequences, one token after the other at a word of the test's."""

    def __init__(self, w: World) -> None:
        self.draws: list[tuple[FakeProcess, dict[str, Any]]] = []
        w.plan.on_message = self._take

    def _take(self, process: FakeProcess, message: dict[str, Any]) -> bool:
        if message["kind"] == "draw":
            self.draws.append((process, message))
        return message["kind"] == "draw"

    def tell(self, begin: int, end: int, ids: list[int] = IDS, version: int = 0) -> None:
        """Tokens of the last draw."""
        process, message = self.draws[-1]
        news = [[message["seq"], ids[begin:end], LOGP[begin:end], version]]
        process.give({"kind": "partial", "news": news})

    def finish(self, end: int, finish: str, ids: list[int] = IDS, version: int = 0) -> None:
        process, message = self.draws[-1]
        process.give(
            {
                "kind": "done", "seq": message["seq"], "finish": finish, "ids": ids[:end],
                "logp": LOGP[:end], "spans": [[end, version]] if end else [],
            }
        )  # fmt: skip

    async def kill(self, w: World) -> None:
        """And wait until the sequence is drawn again."""
        count = len(self.draws)
        w.plan.engine.kill()
        await until(lambda: len(self.draws) > count)


def stream(run, story, **options) -> None:
    async def with_script(w: World) -> None:
        await story(w, Script(w))

    run(with_script, tokenizer=TOKENIZER, **options)


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return [*itertools.chain.from_iterable(lists)]


def aborts(w: World) -> list[int]:
    sent = [message for process in w.plan.processes for message in process.sent]
    return [seq for m in sent if m["kind"] == "abort" for seq in m["seqs"]]


# --- as it comes ---------------------------------------------------------------------------------


def test_text_comes_as_it_is_drawn_with_its_log_probs(run):
    async def story(w: World, script: Script) -> None:
        reading = Reading(w, logprobs=0, stream_options={"include_usage": True})
        await until(lambda: script.draws)
        for i in range(len(IDS)):
            script.tell(i, i + 1)
            whole = TOKENIZER.decode(IDS[: i + 1]).rstrip("\ufffd")
            await until(lambda text=whole: reading.text == text)
            assert reading.finish is None
        script.finish(len(IDS), "length")
        await reading.task
        assert reading.finish == "length" and reading.text == TEXT
        parts = [choice["logprobs"] for choice in reading.choices]
        assert joined(part["token_logprobs"] for part in parts) == LOGP
        assert "".join(joined(part["tokens"] for part in parts)) == TEXT
        for part in parts:
            for token, offset in zip(part["tokens"], part["text_offset"], strict=True):
                assert TEXT[offset : offset + len(token)] == token
        assert reading.events[-1]["usage"]["completion_tokens"] == len(IDS)

    stream(run, story)


def test_what_grew_before_anybody_looked_is_told_at_once():
    """The engine may be quicker than the thread that gets a reader of its text ready."""

    async def look() -> list[Any]:
        sequence = Sequence("", {"partial": True}, 9, asyncio.get_running_loop().create_future())
        sequence.grow([5, 6], [-0.1, -0.2], 0)
        host: Any = SimpleNamespace(cancel=lambda sequences: None)
        async with contextlib.aclosing(as_they_come(host, [sequence])) as batches:
            async with asyncio.timeout(streams.ALIVE_S / 2):
                return [s is sequence for s in await anext(batches)]

    assert asyncio.run(look()) == [True]


def test_a_chat_names_the_role_once_and_ends_with_the_reason(run):
    async def story(w: World, script: Script) -> None:
        hello = [{"role": "user", "content": "Hi"}]
        reading = Reading(w, "/v1/chat/completions", messages=hello, logprobs=True)
        await until(lambda: script.draws)
        script.tell(0, 2)
        await until(lambda: reading.choices)
        script.tell(2, 9, version=3)
        await until(lambda: len(reading.choices) == 2)
        script.finish(9, "stop", version=3)
        await reading.task
        deltas = [choice["delta"] for choice in reading.choices]
        text = TOKENIZER.decode(IDS[:9])
        first = {"role": "assistant", "content": text[:2]}
        assert deltas == [first, {"content": text[2:]}, {}]
        said = joined(c["logprobs"]["content"] for c in reading.choices if c["logprobs"])
        assert [token["logprob"] for token in said] == LOGP[:9]
        assert bytes(joined(token["bytes"] for token in said)).decode() == text
        assert [choice["policy_version"] for choice in reading.choices] == [0, 3, 3]
        assert reading.finish == "stop"

    stream(run, story)


def test_an_answer_without_a_token_is_an_answer(run):
    async def story(w: World, script: Script) -> None:
        hello = [{"role": "user", "content": "Hi"}]
        chat = Reading(w, "/v1/chat/completions", messages=hello)
        await until(lambda: script.draws)
        script.finish(1, "stop", [TOKENIZER.eos_token_id])
        await chat.task
        assert [c["delta"] for c in chat.choices] == [{"role": "assistant", "content": ""}, {}]
        assert chat.finish == "stop"

    stream(run, story)


def test_a_stop_string_ends_the_stream_and_what_the_engine_draws(run):
    async def story(w: World, script: Script) -> None:
        reading = Reading(w, stop=["🙂 o", "zz"], stream_options={"include_usage": True})
        await until(lambda: script.draws)
        cut = len(TOKENIZER("a naïve 🙂 o")["input_ids"])
        script.tell(0, cut - 1)
        await until(lambda: reading.text == "a naïve ")
        script.tell(cut - 1, cut + 3)
        await reading.task
        assert reading.text == "a naïve " and reading.finish == "stop"
        assert reading.events[-1]["usage"]["completion_tokens"] == cut
        assert aborts(w) == [script.draws[0][1]["seq"]] and w.host.in_flight == 0
        assert w.host.counters.total.generated_tokens == cut + 3

    stream(run, story)


def test_only_streams_are_told_of_as_they_grow(run):
    async def story(w: World, script: Script) -> None:
        reading = Reading(w, stream=False)
        drawn = w.draw(await w.job())
        await until(lambda: len(script.draws) == 2)
        assert not any(message.get("partial") for _, message in script.draws)
        for task in (reading.task, drawn):
            task.cancel()

    stream(run, story)


def test_a_slow_reader_is_told_more_at_a_time(run):
    async def story(w: World, script: Script) -> None:
        ids = TOKENIZER("x" * 5000)["input_ids"]
        reading = Reading(w)
        await until(lambda: script.draws)
        script.tell(0, 1, ids)
        await until(lambda: reading.text == "x")
        reading.may_read.clear()
        process, message = script.draws[0]
        for i in range(1, 4999):
            news = [[message["seq"], ids[i : i + 1], [0.0], 0]]
            process.give({"kind": "partial", "news": news})
        await until(lambda: process._out.empty())
        reading.may_read.set()
        await until(lambda: reading.text == "x" * 4999)
        assert len(reading.choices) <= 4  # what was on its way, and the rest
        reading.task.cancel()

    stream(run, story)


def test_who_goes_before_the_first_word_takes_the_sequences_along(run):
    async def story(w: World, script: Script) -> None:
        wish = {"model": "fake", "prompt": [5, 6], "n": 20, "stream": True}
        await w.call("POST", "/v1/completions", body(json.dumps(wish).encode()), GONE)
        assert (w.host.in_flight, len(w.host.queue)) == (0, 0)

    stream(run, story)


# --- when the engine dies ------------------------------------------------------------------------


@pytest.mark.parametrize("again", [3, 7, 12])
def test_what_is_drawn_again_is_not_told_again(run, again):
    async def story(w: World, script: Script) -> None:
        reading = Reading(w, logprobs=0)
        await until(lambda: script.draws)
        script.tell(0, 5)
        script.tell(5, 8)
        await until(lambda: reading.text == TOKENIZER.decode(IDS[:8]))
        await script.kill(w)
        script.tell(0, again)
        script.finish(len(IDS), "stop")
        await reading.task
        assert reading.text == TEXT and reading.finish == "stop"
        assert joined(c["logprobs"]["token_logprobs"] for c in reading.choices) == LOGP

    stream(run, story)


OTHERS = [*IDS[:4], *reversed(IDS[4:])]


@pytest.mark.parametrize(
    ("told", "ids", "end", "finish"),
    [
        (6, OTHERS, 9, "stop"),  # it is noticed while the sequence is drawn
        (0, OTHERS, 9, "stop"),  # or when it has ended
        (4, IDS, 5, "stop"),  # it ends before what was told
    ],
)
def test_what_comes_out_otherwise_ends_the_stream(run, told, ids, end, finish):
    async def story(w: World, script: Script) -> None:
        reading = Reading(w)
        await until(lambda: script.draws)
        script.tell(0, 8)
        await until(lambda: reading.text == TOKENIZER.decode(IDS[:8]))
        await script.kill(w)
        script.tell(0, told, ids)
        script.finish(end, finish, ids)
        await reading.task
        assert reading.text == TOKENIZER.decode(IDS[:8]) and reading.finish is None
        assert reading.events[-1]["error"]["code"] == "engine_lost"
        assert "came out otherwise" in reading.events[-1]["error"]["message"]
        assert (w.host.in_flight, len(w.host.queue)) == (0, 0)

    stream(run, story)


def test_an_update_that_aborts_what_is_drawn_again_ends_it_where_it_was_told(run):
    async def story(w: World, script: Script) -> None:
        reading = Reading(w)
        await until(lambda: script.draws)
        script.tell(0, 8, version=2)
        await until(lambda: reading.text == TOKENIZER.decode(IDS[:8]))
        await script.kill(w)
        script.finish(3, "abort", version=2)
        await reading.task
        assert reading.text == TOKENIZER.decode(IDS[:8]) and reading.finish == "abort"
        assert reading.choices[-1]["policy_version"] == 2

    stream(run, story)


def test_an_engine_that_tells_but_finishes_nothing_is_given_up(run, monkeypatch):
    monkeypatch.setattr("rlalign.rollout.server.engine_host.MAX_ATTEMPTS", 99)

    async def story(w: World, script: Script) -> None:
        reading = Reading(w)
        await until(lambda: script.draws)
        for attempt in range(engine_keeper.MAX_RESTARTS + 1):
            script.tell(0, 1 + attempt)
            await until(lambda n=attempt: reading.text == TEXT[: 1 + n])
            if attempt < engine_keeper.MAX_RESTARTS:
                await script.kill(w)
        w.plan.engine.kill()
        await reading.task
        assert "4th time in a row" in reading.events[-1]["error"]["message"]
        assert reading.text == TEXT[:4]

    stream(run, story)
