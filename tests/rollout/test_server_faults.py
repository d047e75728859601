"""Leases, updates and the engine's deaths in the orders in which they hurt most."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from rlalign.rollout.server import app, doors, engine_host, engine_keeper
from rlalign.rollout.server.engine_process import EngineLost
from tests.rollout.fake_engine import GONE, FakeProcess, World, body

SOON_S = 3.0


def lines(answer: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines() if line]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.01)


# --- leases --------------------------------------------------------------------------------------


def test_a_lease_that_ends_during_an_update_leaves_no_weights_to_the_next_job(run):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_load.clear()
        update = asyncio.create_task(w.update(job, 1))
        await until(lambda: w.plan.engine.sent)
        release = asyncio.create_task(w.http.delete(f"/v1/jobs/{job}"))
        heir = asyncio.create_task(w.job(name="heir", wait_s=10))

        async def inherit() -> Any:
            return await w.draw(await heir)

        drawn = asyncio.create_task(inherit())
        await asyncio.sleep(0.1)
        w.plan.may_load.set()
        assert lines(await drawn)[0]["spans"] == [[1, 0]]
        assert (await release).status_code == 200
        assert (await update).status_code == 404
        assert {path.name for path in w.spool.iterdir()} == {"probe", await heir}

    run(story)


@pytest.mark.parametrize("route", ["draw", "score", "weights"])
def test_a_body_that_ends_after_the_lease_changes_nothing(run, route):
    params = b'"params": {"max_completion_length": 4}'
    bodies = {
        "draw": b'{"requests": [{"ids": [5], "seeds": [1]}], %b}' % params,
        "score": b'{"sequences": [[5, 6]]}',
        "weights": b'{"version": 1}',
    }

    async def story(w: World) -> None:
        job = await w.job()
        w.write(job, 1)

        async def slowly():
            yield bodies[route][:9]
            await w.http.delete(f"/v1/jobs/{job}")
            await w.job(name="heir")
            yield bodies[route][9:]

        answer = await w.http.post(f"/v1/jobs/{job}/{route}", content=slowly())
        assert answer.status_code == 404 and "its lease ended" in answer.text
        assert not w.plan.engine.sent

    run(story)


@pytest.mark.parametrize("route", ["draw", "score"])
def test_who_waits_when_the_lease_ends_is_told(run, route):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_draw.clear()
        if route == "draw":
            waiting = w.draw(job, 20)
        else:
            sequences = {"sequences": [[5, 6]] * 20}
            waiting = asyncio.create_task(w.http.post(f"/v1/jobs/{job}/score", json=sequences))
        await until(lambda: w.host.in_flight)
        await w.http.delete(f"/v1/jobs/{job}")
        answer = await waiting
        assert "its lease ended" in answer.text
        assert answer.status_code == (200 if route == "draw" else 404)
        assert (w.host.in_flight, len(w.host.queue)) == (0, 0)

    run(story)


def test_a_client_that_no_longer_waits_gets_no_lease(run):
    async def story(w: World) -> None:
        job = await w.job()
        wish = json.dumps({"name": "dead", "ttl_s": 3600, "wait_s": 3600}).encode()
        dead = asyncio.create_task(w.call("POST", "/v1/jobs", body(wish), GONE))
        await asyncio.sleep(0.1)
        await w.http.delete(f"/v1/jobs/{job}")
        await w.job(name="heir", wait_s=SOON_S)
        await dead
        assert [job.name for job in w.server._jobs] == ["heir"]

    run(story)


def test_a_full_job_is_not_starved_by_lora_jobs_that_keep_coming(run):
    async def story(w: World) -> None:
        given: list[str] = []

        async def want(name: str, kind: str) -> str:
            job = await w.job(name=name, kind=kind, wait_s=10)
            given.append(name)
            return job

        jobs = [await want(f"early {i}", "lora") for i in range(2)]
        full = asyncio.create_task(want("full", "full"))
        await asyncio.sleep(0.05)
        late = [asyncio.create_task(want(f"late {i}", "lora")) for i in range(3)]
        await asyncio.sleep(0.05)
        refused = await w.http.post("/v1/jobs", json={"name": "hasty", "kind": "lora"})
        assert refused.status_code == 409 and "job 'full' asked before" in refused.text
        for job in jobs:
            assert len(given) == 2
            await w.http.delete(f"/v1/jobs/{job}")
        await w.http.delete(f"/v1/jobs/{await full}")
        await asyncio.gather(*late)
        assert given[2:] == ["full", "late 0", "late 1", "late 2"]

    run(story, max_loras=3)


@pytest.mark.parametrize("how", ["goes away", "waits no longer"])
def test_who_leaves_the_line_holds_nobody_up(run, how):
    async def story(w: World) -> None:
        first = await w.job(kind="lora")
        wait_s = 60 if how == "goes away" else 0.3
        wish = json.dumps({"name": "full", "wait_s": wait_s, "ttl_s": 60}).encode()
        leave = asyncio.Event()
        full = asyncio.create_task(w.call("POST", "/v1/jobs", body(wish), leave=leave))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(w.job(name="late", kind="lora", wait_s=10))
        await asyncio.sleep(0.1)
        assert not late.done()
        if how == "goes away":
            leave.set()
        async with asyncio.timeout(SOON_S):
            await late
        sent = await full
        if how == "waits no longer":
            assert sent[0]["status"] == 409 and b"has the server's weights" in sent[1]["body"]
        assert {job.id for job in w.server._jobs} == {first, await late}

    run(story, max_loras=2)


def test_a_lease_can_be_had_while_the_engine_is_started_again(run):
    async def story(w: World) -> None:
        w.plan.may_start.clear()
        w.plan.engine.kill()
        await until(lambda: len(w.plan.processes) == 2)
        answer = await w.http.post("/v1/jobs", json={"name": "early"})
        assert answer.status_code == 200 and answer.json()["max_len"] == 50
        drawn = w.draw(answer.json()["id"])
        await asyncio.sleep(0.1)
        w.plan.may_start.set()
        assert lines(await drawn)[-1] == {"end": 1}

    run(story)


def test_a_lease_that_ends_as_the_engine_dies_is_free_again_and_its_folder_gone(run):
    async def story(w: World) -> None:
        job = await w.job()
        await w.update(job, 1)

        def die(process: FakeProcess, message: dict[str, Any]) -> bool:
            if process is w.plan.processes[0]:
                process.kill()
            return process is w.plan.processes[0]

        w.plan.on_message = die
        heir = asyncio.create_task(w.job(name="heir", wait_s=10))
        await asyncio.sleep(0.05)
        assert (await w.http.delete(f"/v1/jobs/{job}")).status_code == 503
        assert lines(await w.draw(await heir))[0]["spans"] == [[1, 0]]
        assert not (w.spool / job).exists()

    run(story)


def test_a_server_that_stood_still_does_not_blame_its_jobs(run, monkeypatch):
    async def story(w: World) -> None:
        job = await w.job(ttl_s=1)
        await asyncio.sleep(2 * app.REAP_S)
        app.time.sleep(2.5)  # nothing of this process runs, the reaper neither
        await asyncio.sleep(app.REAP_S)
        assert (await w.http.post(f"/v1/jobs/{job}/heartbeat")).status_code == 200
        await asyncio.sleep(2)
        assert (await w.http.post(f"/v1/jobs/{job}/heartbeat")).status_code == 404

    run(story)


# --- clients that go away or are slow ------------------------------------------------------------


def test_a_client_that_goes_before_its_first_line_takes_its_sequences_along(run):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_draw.clear()
        wish = {
            "requests": [{"ids": [5], "seeds": list(range(20))}],
            "params": {"max_completion_length": 4},
        }
        await w.call("POST", f"/v1/jobs/{job}/draw", body(json.dumps(wish).encode()), GONE)
        assert (w.host.in_flight, len(w.host.queue)) == (0, 0)
        wish = {"sequences": [[5, 6]] * 20}
        await w.call("POST", f"/v1/jobs/{job}/score", body(json.dumps(wish).encode()), GONE)
        assert (w.host.in_flight, len(w.host.queue)) == (0, 0)

    run(story)


def test_a_body_that_does_not_come_is_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(doors, "BODY_S", 0.2)

    async def story(w: World) -> None:
        part = {"type": "http.request", "body": b'{"name"', "more_body": True}
        async with asyncio.timeout(SOON_S):
            start, *rest = await w.call("POST", "/v1/jobs", part)
        assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
        assert b"did not arrive" in rest[0]["body"]

    run(story)


# --- weights -------------------------------------------------------------------------------------


def test_what_was_accepted_is_replayed_whatever_the_client_wrote_since(run):
    async def story(w: World) -> None:
        job = await w.job()
        receipt = (await w.update(job, 5)).json()
        assert (await w.update(job, 5, b"bad")).status_code == 400
        assert [path.name for path in (w.spool / job).iterdir()] == ["taken-0"]
        w.write(job, 6, b"half of")
        w.plan.engine.kill()
        await until(lambda: len(w.plan.processes) == 2 and w.host.alive)
        assert lines(await w.draw(job))[0]["spans"] == [[1, 5]]
        assert (await w.http.get("/v1/server")).json()["jobs"][0]["digest"] == receipt["digest"]

    run(story)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_updates_at_once_do_not_take_each_others_files(run, kind):
    async def story(w: World) -> None:
        job = await w.job(kind=kind)
        w.plan.may_load.clear()
        updates = [asyncio.create_task(w.update(job, v, b"%d" % v)) for v in (1, 2)]
        await asyncio.sleep(0.1)
        w.write(job, 3)
        w.plan.may_load.set()
        assert [(await update).status_code for update in updates] == [200, 200]
        third = await w.http.post(f"/v1/jobs/{job}/weights", json={"version": 3})
        assert third.status_code == 200
        assert len(list((w.spool / job).iterdir())) == 1

    run(story, max_loras=1)


def test_an_update_that_takes_too_long_cannot_answer_for_the_next(run, monkeypatch):
    monkeypatch.setattr(engine_host, "UPDATE_TIMEOUT_S", 0.3)

    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_load.clear()
        late = await w.update(job, 1, b"one")
        assert late.status_code == 504 and "version 1 took more than 0.3 s" in late.text
        w.plan.may_load.set()
        await until(lambda: w.host.alive)
        second = (await w.update(job, 2, b"two")).json()
        assert second["digest"] == "3fc4ccfe745870e2"  # of sha256(b"two")
        assert lines(await w.draw(job))[0]["spans"] == [[1, 2]]
        assert w.host.counters.restarts == 1

    run(story)


# --- the engine's deaths -------------------------------------------------------------------------


def test_an_engine_that_dies_as_its_weights_are_back_is_started_again(run):
    async def story(w: World) -> None:
        job = await w.job()
        await w.update(job, 1)

        def die_once(process: FakeProcess, message: dict[str, Any]) -> bool:
            if process is w.plan.processes[1]:
                process.version = 1
                digest = w.host.update.digest  # type: ignore[union-attr]
                process.give({"kind": "updated", "digest": digest})
                process.give(None)
            return process is w.plan.processes[1]

        w.plan.on_message = die_once
        w.plan.engine.kill()
        await until(lambda: len(w.plan.processes) == 3 and w.host.alive)
        assert lines(await w.draw(job))[0]["spans"] == [[1, 1]]

    run(story)


@pytest.mark.parametrize("error", [EngineLost("no memory"), OSError("no processes"), ValueError()])
def test_an_engine_that_cannot_be_started_again_is_told_to_everybody(run, error):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_draw.clear()
        drawn = w.draw(job, 20)
        await until(lambda: w.host.in_flight)

        def fail(process: FakeProcess) -> None:
            raise error

        w.plan.on_start = fail
        waiting = asyncio.create_task(w.update(job, 1))
        w.plan.engine.kill()
        async with asyncio.timeout(SOON_S):
            assert str(error) in lines(await drawn)[-1]["error"]
            assert (await waiting).status_code == 503
            assert (await w.http.get("/health")).status_code == 503
            await w.http.delete(f"/v1/jobs/{job}")
            assert (await w.http.post("/v1/jobs", json={"name": "x"})).status_code == 503
        w.host.keeper._keeping and await asyncio.wait([w.host.keeper._keeping])

    run(story)


def test_an_engine_that_gets_something_done_may_die_any_number_of_times(run):
    async def story(w: World) -> None:
        job = await w.job()
        for deaths in range(1, 11):
            assert lines(await w.draw(job))[-1] == {"end": 1}
            w.plan.engine.kill()
            await until(lambda n=deaths: len(w.plan.processes) == n + 1 and w.host.alive)
        assert w.host.counters.restarts == 10

    run(story)


def test_an_engine_that_never_gets_anything_done_is_given_up(run):
    async def story(w: World) -> None:
        w.plan.on_start = lambda process: process.give(None)
        w.plan.engine.kill()
        await until(lambda: w.host.failure)
        assert "4th time in a row" in w.host.failure
        assert len(w.plan.processes) == 1 + engine_keeper.MAX_RESTARTS

    run(story)


def test_a_sequence_that_kills_the_engine_goes_before_the_engine_does(run):
    async def story(w: World) -> None:
        job = await w.job()

        def poison(process: FakeProcess, message: dict[str, Any]) -> bool:
            if message.get("seed") == 13:
                process.kill()
            return message.get("seed") == 13

        w.plan.on_message = poison
        text = (await w.draw(job, 20)).text
        assert "the engine died 3 times on this sequence" in text
        assert lines(await w.draw(job, 13))[-1] == {"end": 13}

    run(story, slots=1)


def test_an_engine_that_hangs_is_started_again(run):
    async def story(w: World) -> None:
        job = await w.job()
        await w.update(job, 5)
        w.plan.may_draw.clear()
        drawn = w.draw(job)
        await until(lambda: len(w.plan.processes) == 2 and w.host.alive)
        w.plan.may_draw.set()
        assert lines(await drawn)[0]["spans"] == [[1, 5]]

    run(story, stall_s=0.4)


def test_an_engine_that_works_and_says_so_is_left_alone(run):
    async def story(w: World) -> None:
        w.plan.may_draw.clear()
        drawn = w.draw(await w.job())
        for _ in range(12):
            await asyncio.sleep(0.1)
            w.plan.engine.give({"kind": "alive"})
        w.plan.may_draw.set()
        assert lines(await drawn)[0]["spans"] == [[1, 0]]
        assert len(w.plan.processes) == 1

    run(story, stall_s=0.4)


def test_a_slow_update_is_not_taken_for_a_hang(run):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_load.clear()
        updated = asyncio.create_task(w.update(job, 5))
        await asyncio.sleep(1.2)
        w.plan.may_load.set()
        assert (await updated).status_code == 200
        assert len(w.plan.processes) == 1

    run(story, stall_s=0.4)


def test_a_job_whose_weights_died_is_told_and_gets_nothing_until_it_sends_them(run):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.on_message = lambda engine, message: (
            message["kind"] == "update"
            and message["source"] is not None
            and bool(engine.give({"kind": "updated", "digest": "d"}) or True)
        )
        sent = {"version": 3, "channel": "ipc"}
        assert (await w.http.post(f"/v1/jobs/{job}/weights", json=sent)).status_code == 200
        beat = (await w.http.post(f"/v1/jobs/{job}/heartbeat")).json()
        assert (beat["version"], beat["digest"]) == (3, "d")
        w.plan.engine.kill()
        await until(lambda: len(w.plan.processes) == 2 and w.host.alive)
        assert (await w.http.post(f"/v1/jobs/{job}/heartbeat")).json()["digest"] == ""
        assert (await w.draw(job)).status_code == 410
        assert (await w.http.post(f"/v1/jobs/{job}/weights", json=sent)).status_code == 200
        assert lines(await w.draw(job))[0]["finish"] == "stop"

    run(story)
