"""Searches on the server, with methods and an engine that are fakes: queues, leases, clients that
leave, and an event loop that nobody may hold up."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.search import Draw, Rate
from tests.rollout.fake_engine import World
from tests.rollout.search_methods import Lengths, Stubs, draw, found, rounds
from tests.rollout.test_server_faults import until

BODY = {"prompt": [5, 6], "max_tokens": 4}


def ask(w: World, model: str, **body: Any) -> asyncio.Task[Any]:
    content = {"model": model, **BODY, **body}
    return asyncio.create_task(w.http.post("/v1/completions", json=content))


def drawn(w: World) -> list[tuple[str, int]]:
    """Job and seed of each sequence that the engines were given."""
    sent = [message for process in w.plan.processes for message in process.sent]
    return [(m["job"], m["seed"]) for m in sent if m["kind"] == "draw"]


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_rounds_are_sequences_of_the_queue_and_the_answer_has_its_account(run, tokenizer):
    rater = Lengths()
    methods = Stubs(two=rounds(3, 2, rater=rater))

    async def story(w: World) -> None:
        answer = (await ask(w, "fake@two", seed=7, testtime={"q": 5})).json()
        [choice] = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("found", "stop")
        assert choice["testtime"] == {"scores": [0, 1, 2, 0, 1], "policy_versions": [0]}
        assert rater.calls == [3, 2]
        assert drawn(w) == [("openai", seed) for seed in (0, 1, 2, 100, 101)]
        assert answer["usage"] == {
            "prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7,
            "completion_tokens_details": {"reasoning_tokens": 4},
        }  # fmt: skip
        [asked] = methods.asked
        assert (asked.ids, asked.text) == ((5, 6), None)
        assert asked.options == {"q": 5, "seed": 7, "max_new_tokens": 4}

    run(story, tokenizer=tokenizer, methods=methods)


def test_a_search_runs_as_the_job_of_its_name_and_ends_with_its_lease(run, tokenizer):
    async def story(w: World) -> None:
        job = await w.job(kind="lora", name="run/a")
        assert (await ask(w, "run/a@two")).status_code == 200
        assert [name for name, _ in drawn(w)] == [job] * 2
        w.plan.may_draw.clear()
        late = ask(w, "run/a@two")
        await until(lambda: w.host.in_flight == 1)
        await w.http.delete(f"/v1/jobs/{job}")
        w.plan.may_draw.set()
        answer = await late
        assert answer.status_code == 404 and "lease ended" in answer.json()["error"]["message"]
        assert {name for name, _ in drawn(w)} == {job}  # nothing under the base model

    run(story, tokenizer=tokenizer, methods=Stubs(two=rounds(1, 1)), max_loras=1)


def test_a_lease_that_ends_between_two_rounds_ends_the_search(run, tokenizer):
    """The second round must not be drawn by the base model, which has no such job."""
    gate = asyncio.Event()

    class Slow:
        def rate(self, items):
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10)
            return [1.0]

    loop = None

    def method(model, asked, progress):
        yield [draw(asked)]
        yield [Rate(Slow(), None, "")]
        yield [draw(asked, seed=1)]
        return found()

    async def story(w: World) -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        job = await w.job(kind="lora", name="run/a")
        answer = ask(w, "run/a@slow")
        await until(lambda: len(drawn(w)) == 1 and not w.host.in_flight)
        await w.http.delete(f"/v1/jobs/{job}")
        gate.set()
        assert (await answer).status_code == 404
        assert len(drawn(w)) == 1

    run(story, tokenizer=tokenizer, methods=Stubs(slow=method), max_loras=1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_search(run, tokenizer, stream):
    methods = Stubs(two=rounds(3, 2))

    async def story(w: World) -> None:
        w.plan.may_draw.clear()
        leave, body = asyncio.Event(), {"model": "fake@two", **BODY, "stream": stream}
        message = {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        call = asyncio.create_task(w.call("POST", "/v1/completions", message, leave=leave))
        await until(lambda: w.host.in_flight == 3)
        leave.set()
        await until(lambda: not w.host.in_flight and not w.server.searches.running)
        await until(lambda: methods.closed == ["two"])
        aborted = [m for m in w.plan.engine.sent if m["kind"] == "abort"]
        assert sorted(seq for m in aborted for seq in m["seqs"]) == [0, 1, 2]
        await call

    run(story, tokenizer=tokenizer, methods=methods)


def test_a_first_round_without_room_is_refused_and_a_later_one_waits(run, tokenizer):
    methods = Stubs(wide=rounds(9), late=rounds(1, 3))

    async def story(w: World) -> None:
        for stream in (False, True):
            refused = await ask(w, "fake@wide", stream=stream)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        w.plan.may_draw.clear()
        late = ask(w, "fake@late")
        await until(lambda: w.host.in_flight == 1)
        other = ask(w, "fake", n=5)
        await until(lambda: w.host.load("openai") == (2, 4))
        hold(w)  # the search's first draw may end, the others not
        await until(lambda: w.server.searches.running == 1 and w.host.load("openai")[1] == 4)
        await asyncio.sleep(0.2)
        assert len(drawn(w)) < 9 and not late.done()
        w.plan.may_draw.set()
        assert (await late).status_code == (await other).status_code == 200

    def hold(w: World) -> None:
        first = next(m for m in w.plan.engine.sent if m["kind"] == "draw")
        done = {"kind": "done", "seq": first["seq"], "ids": [1], "logp": [0.0]}
        w.plan.engine.give({**done, "finish": "stop", "spans": [[1, 0]]})

    run(story, tokenizer=tokenizer, methods=methods, slots=4, max_queued=6)


def test_a_search_is_not_begun_where_there_is_no_room_now(run, tokenizer):
    async def story(w: World) -> None:
        w.plan.may_draw.clear()
        other = ask(w, "fake", n=5)
        await until(lambda: w.host.in_flight == 5)
        assert (await ask(w, "fake@pair")).status_code == 429
        w.plan.may_draw.set()
        await other
        assert (await ask(w, "fake@pair")).status_code == 200

    run(story, tokenizer=tokenizer, methods=Stubs(pair=rounds(2)), max_queued=6)


def test_a_round_that_never_has_room_ends_a_search_that_has_begun(run, tokenizer):
    async def story(w: World) -> None:
        answer = await ask(w, "fake@grows")
        assert answer.status_code == 429 and "max_queued=6" in answer.json()["error"]["message"]

    run(story, tokenizer=tokenizer, methods=Stubs(grows=rounds(1, 7)), max_queued=6)


def test_the_engine_dies_in_the_middle_and_nobody_notices(run, tokenizer):
    async def story(w: World) -> None:
        w.plan.may_draw.clear()
        answer = ask(w, "fake@two")
        await until(lambda: w.host.in_flight == 3)
        w.plan.engine.kill()
        await until(lambda: len(w.plan.processes) == 2)
        w.plan.may_draw.set()
        assert (await answer).json()["choices"][0]["text"] == "found"
        assert drawn(w) == [("openai", s) for s in (0, 1, 2, 0, 1, 2, 100, 101)]

    run(story, tokenizer=tokenizer, methods=Stubs(two=rounds(3, 2)))


def test_a_search_that_computes_holds_nobody_up(run, tokenizer):
    class Slow:
        def rate(self, items):
            time.sleep(0.6)
            return [1.0] * len(items)

    def method(model, asked, progress):
        time.sleep(0.6)
        yield [Rate(Slow(), None, "")]
        return found()

    async def story(w: World) -> None:
        answer, longest = ask(w, "fake@slow"), 0.0
        while not answer.done():
            began = time.monotonic()
            assert (await w.http.get("/health")).status_code == 200
            longest = max(longest, time.monotonic() - began)
            await asyncio.sleep(0.01)
        assert answer.result().status_code == 200
        assert longest < 0.4

    run(story, tokenizer=tokenizer, methods=Stubs(slow=method))


def test_one_rater_scores_one_batch_at_a_time(run, tokenizer):
    class Alone:
        inside = 0

        def rate(self, items):
            self.inside += 1
            assert self.inside == 1
            time.sleep(0.05)
            self.inside -= 1
            return [1.0] * len(items)

    async def story(w: World) -> None:
        answers = await asyncio.gather(*(ask(w, "fake@rated") for _ in range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4

    run(story, tokenizer=tokenizer, methods=Stubs(rated=rounds(2, 2, rater=Alone())))


def test_a_request_that_fails_is_an_error_inside_the_search(run, tokenizer):
    """What the engine refuses, and what it would: the search may go on without."""

    def method(model, asked, progress):
        heard = []
        for bad in (draw(asked, seed=666), Draw((5, 1000), SamplingParams(4))):
            try:
                yield [draw(asked), bad]
            except EngineError as error:
                heard.append(str(error))
        return found(heard=heard)

    def refuse(process, message):
        if message.get("seed") == 666:
            process.give({"kind": "failed", "seq": message["seq"], "error": "not finite"})
        return message.get("seed") == 666

    async def story(w: World) -> None:
        w.plan.on_message = refuse
        answer = (await ask(w, "fake@careful")).json()
        first, second = answer["choices"][0]["testtime"]["heard"]
        assert first == "not finite" and "1000" in second

    run(story, tokenizer=tokenizer, methods=Stubs(careful=method))


def test_an_error_of_the_method_is_a_400_and_ends_a_stream(run, tokenizer):
    def method(model, asked, progress):
        yield [draw(asked)]
        raise EngineError("the prompt is too long")

    async def story(w: World) -> None:
        answer = await ask(w, "fake@bad")
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "the prompt is too long"
        streamed = await ask(w, "fake@bad", stream=True)
        last = streamed.text.strip().split("\n\n")[-1]
        assert (
            "the prompt is too long" in json.loads(last.removeprefix("data: "))["error"]["message"]
        )

    run(story, tokenizer=tokenizer, methods=Stubs(bad=method))


def test_a_stream_tells_of_progress_and_then_the_text(run, tokenizer, monkeypatch):
    monkeypatch.setattr("rlalign.rollout.server.openai_search.PROGRESS_S", 0.05)
    gates = [asyncio.Event() for _ in range(2)]

    def pause(process, message):
        async def later():
            await gates[message["seed"] // 100].wait()
            done = {"kind": "done", "seq": message["seq"], "ids": [1, 2], "logp": [0.0, 0.0]}
            process.give({**done, "finish": "stop", "spans": [[2, 3]]})

        process._tasks.append(asyncio.create_task(later()))
        return True

    async def story(w: World) -> None:
        w.plan.on_message = pause
        options = {"stream": True, "stream_options": {"include_usage": True}}
        answer = ask(w, "fake@two", **options)
        for gate in gates:
            await asyncio.sleep(0.2)
            gate.set()
        told = events((await answer).text)
        usage = told.pop()["usage"]
        assert usage["completion_tokens"] == 10
        *progress, last = [event["choices"][0] for event in told]
        assert all(part["text"] == "" and part["finish_reason"] is None for part in progress)
        counts = [part["testtime"]["num_generated_tokens"] for part in progress]
        assert counts[0] == 0 and 6 in counts and counts == sorted(set(counts))
        assert [p["testtime"]["best_reward"] for p in progress][-1] == 2.0
        assert (last["text"], last["finish_reason"], last["policy_version"]) == ("found", "stop", 3)
        assert last["testtime"]["policy_versions"] == [3]

    run(story, tokenizer=tokenizer, methods=Stubs(two=rounds(3, 2, rater=Lengths())))


def test_several_searches_and_a_plain_request_at_once(run, tokenizer):
    methods = Stubs(two=rounds(3, 2), one=rounds(1))

    async def story(w: World) -> None:
        answers = [ask(w, "fake@two", prompt=[[5], [6]]), ask(w, "fake@one"), ask(w, "fake", n=2)]
        both, one, plain = [(await answer).json() for answer in answers]
        assert [choice["index"] for choice in both["choices"]] == [0, 1]
        assert both["usage"]["completion_tokens"] == 10
        assert [asked.id for asked in methods.asked] == ["0", "1", "0"]
        assert one["choices"][0]["text"] == "found" and len(plain["choices"]) == 2
        assert (await w.http.get("/v1/server")).json()["searches"] == 0

    run(story, tokenizer=tokenizer, methods=methods)


def test_names(run, tokenizer):
    async def story(w: World) -> None:
        await w.job(kind="lora", name="a@two")
        models = (await w.http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["fake", "a@two", "fake@two", "a@two@two"]
        for name in ("fake@two", "a@two", "a@two@two"):
            assert (await w.http.get(f"/v1/models/{name}")).json()["id"] == name
        assert (await ask(w, "a@two")).json()["choices"][0].get("testtime") is None
        for name in ("fake@three", "b@two", "@two"):
            missing = await ask(w, name)
            assert missing.status_code == 404
            assert "fake, a@two, alone or as NAME@METHOD" in missing.json()["error"]["message"]
        plain = await ask(w, "fake", testtime={})
        assert plain.status_code == 400 and "fake@METHOD" in plain.json()["error"]["message"]

    run(story, tokenizer=tokenizer, methods=Stubs(two=rounds(1)), max_loras=1)


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"n": 2}, "n=2"), ({"stop": ["x"]}, "stop"), ({"ignore_eos": True}, "ignore_eos"),
        ({"logprobs": 0}, "logprobs"), ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"seed": 1, "testtime": {"seed": 2}}, "seed is given twice"),
        ({"testtime": [1]}, "testtime"), ({"testtime": "x"}, "testtime"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_with_a_method_is_refused_by_name(run, tokenizer, body, reason):
    async def story(w: World) -> None:
        answer = await ask(w, "fake@one", **body)
        assert answer.status_code == 400 and reason in answer.json()["error"]["message"]
        assert not drawn(w)

    run(story, tokenizer=tokenizer, methods=Stubs(one=rounds(1)))


def test_an_update_that_aborts_what_its_job_runs_ends_the_search(run, tokenizer):
    def abort(process, message):
        if message["kind"] == "draw":
            done = {"kind": "done", "seq": message["seq"], "ids": [], "logp": [], "spans": []}
            process.give({**done, "finish": "abort"})
        return message["kind"] == "draw"

    async def story(w: World) -> None:
        w.plan.on_message = abort
        answer = await ask(w, "fake@one")
        assert answer.status_code == 503 and "in_flight=abort" in answer.json()["error"]["message"]

    run(story, tokenizer=tokenizer, methods=Stubs(one=rounds(1)))
