"""How much one job may have, who gets more, and what is remembered: an engine that is a fake."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlalign.rollout.server import metrics
from tests.rollout.fake_engine import World
from tests.rollout.test_server_faults import lines, until

PROMPT = {"model": "fake", "prompt": [5, 6], "max_tokens": 4}


def drawn(w: World) -> list[str]:
    """The job of each sequence that the engine was given, in order."""
    return [m["job"] for m in w.plan.engine.sent if m["kind"] == "draw"]


def test_twice_the_priority_is_twice_the_tokens_while_both_wait(run):
    async def story(w: World) -> None:
        plain = await w.job(kind="lora")
        urgent = await w.job(kind="lora", priority=2.0)
        w.plan.may_draw.clear()
        answers = [w.draw(job, 60) for job in (plain, urgent)]
        await until(lambda: w.host.in_flight and len(w.host.queue) == 119)
        w.plan.may_draw.set()
        await asyncio.gather(*answers)
        first = Counter(drawn(w)[:60])
        assert first[urgent] == pytest.approx(2 * first[plain], abs=3)
        jobs = (await w.http.get("/v1/server")).json()["jobs"]
        assert [job["priority"] for job in jobs] == [1.0, 2.0]

    run(story, max_loras=2, slots=1)


@pytest.mark.parametrize("priority", [0, -1, 1e-300, 1e300, True, "2"])
def test_a_priority_that_makes_no_sense_is_refused(run, priority):
    async def story(w: World) -> None:
        answer = await w.http.post("/v1/jobs", json={"name": "x", "priority": priority})
        assert answer.status_code == 400 and "priority" in answer.json()["error"]

    run(story)


def test_a_job_may_queue_so_much_and_no_more_until_some_is_done(run):
    async def story(w: World) -> None:
        job, other = [await w.job(kind="lora") for _ in range(2)]
        w.plan.may_draw.clear()
        first = w.draw(job, 12)
        await until(lambda: w.host.in_flight == 8)
        state = (await w.http.get("/v1/server")).json()
        assert (state["max_queued"], state["max_in_flight"]) == (20, None)
        assert (state["jobs"][0]["waiting"], state["jobs"][0]["in_flight"]) == (4, 8)
        refused = await w.draw(job, 9)
        assert refused.status_code == 429 and "max_queued=20" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) > 0
        scores = {"sequences": [[5, 6]] * 9}
        assert (await w.http.post(f"/v1/jobs/{job}/score", json=scores)).status_code == 429
        assert w.host.load(job) == (4, 8)
        more = [w.draw(job, 8), w.draw(other, 20)]  # another job's are not counted
        await until(lambda: len(w.host.queue) == 32)
        assert (await w.draw(job, 1)).status_code == 429
        w.plan.may_draw.set()
        for answer, count in zip((first, *more), (12, 8, 20), strict=True):
            assert lines(await answer)[-1] == {"end": count}
        assert lines(await w.draw(job, 20))[-1] == {"end": 20}

    run(story, max_loras=2, max_queued=20)


def test_what_nobody_waits_for_any_more_makes_room(run):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_draw.clear()
        left = w.draw(job, 20)
        await until(lambda: w.host.in_flight)
        left.cancel()
        await until(lambda: w.host.load(job) == (0, 0))
        again = w.draw(job, 20)
        w.plan.may_draw.set()
        assert lines(await again)[-1] == {"end": 20}

    run(story, max_queued=20)


def test_requests_of_openais_kind_are_one_job_with_the_same_quota(run):
    async def story(w: World) -> None:
        w.plan.may_draw.clear()
        posts = [w.http.post("/v1/completions", json={**PROMPT, "n": 10}) for _ in range(2)]
        tasks = [asyncio.create_task(post) for post in posts]
        await until(lambda: len(w.host.queue) == 12)
        for stream in (False, True):
            refused = await w.http.post("/v1/completions", json={**PROMPT, "stream": stream})
            error = refused.json()["error"]
            assert refused.status_code == 429 and "max_queued=20" in error["message"]
            assert error["type"] == "rate_limit_error"
        for task in tasks:
            task.cancel()

    run(story, max_queued=20)


def test_a_job_does_not_fill_the_engine(run):
    async def story(w: World) -> None:
        greedy, modest = [await w.job(kind="lora") for _ in range(2)]
        w.plan.may_draw.clear()
        first = w.draw(greedy, 40)
        await until(lambda: w.host.load(greedy) == (35, 5))
        second = w.draw(modest, 2)
        await until(lambda: w.host.load(modest) == (0, 2))
        assert w.host.load(greedy) == (35, 5)
        w.plan.may_draw.set()
        assert lines(await first)[-1] == {"end": 40}
        assert lines(await second)[-1] == {"end": 2}

    run(story, max_loras=2, max_in_flight=5)


def test_a_job_that_fills_its_part_goes_on_when_the_engine_died(run):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_draw.clear()
        answer = w.draw(job, 20)
        await until(lambda: w.host.load(job) == (15, 5))
        w.plan.engine.kill()
        await until(lambda: len(w.plan.processes) == 2 and w.host.load(job) == (15, 5))
        w.plan.may_draw.set()
        assert lines(await answer)[-1] == {"end": 20}

    run(story, max_in_flight=5)


# --- what is remembered of jobs ------------------------------------------------------------------


async def counted(w: World) -> dict[tuple[str, ...], float]:
    text = (await w.http.get("/metrics")).text
    return {
        (sample.name.removeprefix("rlalign_server_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "sequences_total" in sample.name
    }


def test_a_server_that_lives_for_long_forgets_old_jobs_and_no_total(run, monkeypatch):
    monkeypatch.setattr(metrics, "KEPT_NAMES", 3)

    async def story(w: World) -> None:
        async def live_and_die(name: str) -> None:
            job = await w.job(name=name, kind="lora")
            await w.draw(job, 2)
            await w.http.delete(f"/v1/jobs/{job}")

        await live_and_die("comes back")
        there = await w.job(name="comes back", kind="lora")
        for i in range(10):
            await live_and_die(f"run {i}")
        await w.draw(there, 5)
        now = await counted(w)
        assert now == {
            ("all_sequences_total",): 2 + 20 + 5,
            ("sequences_total", "comes back"): 7,
            **{("sequences_total", f"run {i}"): 2 for i in (7, 8, 9)},
        }
        [job] = (await w.http.get("/v1/server")).json()["jobs"]
        assert w.host.counters.by_job.keys() == {job["id"]} == w.server._jobs.names.keys()
        await w.http.delete(f"/v1/jobs/{there}")
        now = await counted(w)
        assert ("sequences_total", "run 7") not in now and now["sequences_total", "comes back"] == 7

    run(story, max_loras=2)


# --- requests ------------------------------------------------------------------------------------


def test_so_many_requests_are_open_and_no_more_but_no_lease_is_lost(run):
    async def story(w: World) -> None:
        job = await w.job()
        w.plan.may_draw.clear()
        waiting = [w.draw(job) for _ in range(3)]
        await until(lambda: w.host.in_flight == 3)
        for refused in (await w.draw(job), await w.http.get("/v1/server"), await w.http.get("/")):
            assert refused.status_code == 503 and "max_requests" in refused.json()["error"]
            assert int(refused.headers["retry-after"]) > 0
        assert (await w.http.get("/health")).status_code == 200
        assert (await w.http.post(f"/v1/jobs/{job}/heartbeat")).status_code == 200
        wrong = {"Authorization": "Bearer wrong"}
        assert (await w.http.get("/v1/server", headers=wrong)).status_code == 401
        waiting.pop().cancel()  # one that leaves makes room
        await until(lambda: w.host.in_flight == 2)
        assert (await w.http.get("/v1/server")).status_code == 200
        w.plan.may_draw.set()
        for answer in waiting:
            assert lines(await answer)[-1] == {"end": 1}
        w.plan.may_draw.clear()
        waiting = [w.draw(job) for _ in range(3)]
        await until(lambda: w.host.in_flight == 3)
        assert (await w.http.delete(f"/v1/jobs/{job}")).status_code == 200
        for answer in waiting:
            assert "its lease ended" in (await answer).text

    run(story, max_requests=3)
