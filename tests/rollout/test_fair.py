"""Which job runs next, and whose lease it is: pure decisions, without a server."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.rollout.server.fair import FairQueue
from rlalign.rollout.server.jobs import Busy, JobError, JobTable


def served(queue: FairQueue, count: int) -> Counter:
    """Tokens each job was given in `count` turns; items are (job, tokens)."""
    totals: Counter[str] = Counter()
    for _ in range(count):
        job, tokens = queue.pop()
        totals[job] += tokens
    return totals


def test_jobs_share_tokens_by_weight_whatever_the_length_of_their_sequences():
    queue: FairQueue = FairQueue()
    queue.set_weight("heavy", 3.0)
    draw = random.Random(0)
    for job, longest in (("long", 1000), ("short", 10), ("heavy", 100)):
        for _ in range(20_000):
            tokens = draw.randint(1, longest)
            queue.push(job, (job, tokens), tokens)
    totals = served(queue, 5000)
    assert totals["long"] == pytest.approx(totals["short"], abs=1500)
    assert totals["heavy"] == pytest.approx(3 * totals["short"], abs=1500)


def test_a_newcomer_gets_its_turn_and_no_arrears():
    queue: FairQueue = FairQueue()
    for _ in range(100):
        queue.push("old", ("old", 10), 10)
    served(queue, 50)
    for _ in range(100):
        queue.push("new", ("new", 10), 10)
    turns = [queue.pop()[0] for _ in range(20)]
    assert "new" in turns[:2] and turns.count("new") in (10, 11)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=60))
def test_every_item_comes_out_once_and_in_its_jobs_order(pushed):
    queue: FairQueue = FairQueue()
    for i, (job, tokens) in enumerate(pushed):
        queue.push(job, (job, i), tokens)
    assert len(queue) == len(pushed)
    out = [queue.pop() for _ in pushed]
    assert sorted(i for _, i in out) == list(range(len(pushed)))
    for job in "abc":
        mine = [i for name, i in out if name == job]
        assert mine == sorted(mine)
    with pytest.raises(IndexError, match="nothing waits"):
        queue.pop()


def test_what_comes_back_runs_before_its_jobs_others():
    queue: FairQueue = FairQueue()
    for item in ("first", "second"):
        queue.push("a", item, 5)
    assert queue.pop() == "first"
    queue.push("a", "first", 5, first=True)
    assert [queue.pop(), queue.pop()] == ["first", "second"]


def test_a_dropped_job_leaves_nothing():
    queue: FairQueue = FairQueue()
    for job, item in (("a", 1), ("b", 2), ("a", 3)):
        queue.push(job, item, 5)
    assert queue.drop("a") == [1, 3]
    assert (len(queue), queue.pop()) == (1, 2)


def test_what_was_never_served_is_not_paid_for():
    """A job that gave up its sequences is not behind the others for it."""
    queue: FairQueue = FairQueue()
    given_up = {("a", i) for i in range(1000)}
    for item in given_up:
        queue.push("a", item, tokens=1000)
    queue.discard(given_up)
    assert len(queue) == 0
    for i in range(50):
        for job in ("a", "b"):
            queue.push(job, (job, 10 + i % 2), tokens=10)
    assert {queue.pop()[0] for _ in range(2)} == {"a", "b"}


def test_a_job_that_is_full_is_passed_over_and_has_no_arrears_after_it():
    queue: FairQueue = FairQueue()
    for job in ("full", "free"):
        for _ in range(100):
            queue.push(job, (job, 10), 10)
    assert {queue.pop({"full"})[0] for _ in range(50)} == {"free"}
    turns = [queue.pop()[0] for _ in range(20)]
    assert turns.count("full") in (10, 11)
    with pytest.raises(IndexError, match="nothing waits"):
        queue.pop({"full", "free"})


def test_a_newcomer_beside_a_job_that_was_full_does_not_starve_the_others():
    queue: FairQueue = FairQueue()
    for job in ("full", "free"):
        for _ in range(300):
            queue.push(job, (job, 10), 10)
    for _ in range(200):
        queue.pop({"full"})
    queue.pop()
    for _ in range(100):
        queue.push("new", ("new", 10), 10)
    turns = Counter(queue.pop()[0] for _ in range(30))
    assert all(9 <= turns[job] <= 11 for job in ("full", "free", "new"))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_lives_as_long_as_it_is_renewed():
    clock = Clock()
    table = JobTable(clock=clock)
    job = table.acquire("run", ttl_s=10)
    for _ in range(5):
        clock.now += 9
        table.renew(job.id)
        assert not table.expired()
    clock.now += 10
    assert table.expired() == [job]
    with pytest.raises(JobError, match="its lease ended"):
        table.renew(job.id)


def test_one_full_job_at_a_time_and_the_next_when_it_is_over():
    clock = Clock()
    table = JobTable(clock=clock)
    job = table.acquire("run", ttl_s=10)
    clock.now += 4
    with pytest.raises(Busy, match=r"job 'run' has the server's weights for another 6 s"):
        table.acquire("other")
    table.release(job.id)
    with pytest.raises(JobError, match="its lease ended"):
        table.renew(job.id)
    with pytest.raises(Busy):  # its weights may still be in the engine
        table.acquire("other")
    table.free(job)
    assert table.acquire("other").id != job.id


def test_lora_jobs_share_the_server_up_to_its_places_and_never_with_a_full_one():
    clock = Clock()
    table = JobTable(max_loras=2, clock=clock)
    first = table.acquire("a", "lora", ttl_s=10)
    table.acquire("b", "lora", ttl_s=20)
    with pytest.raises(Busy, match="job 'a' has an adapter's place for another 10 s"):
        table.acquire("c", "lora")
    with pytest.raises(Busy, match="job 'a' has the server's weights"):
        table.acquire("d", "full")
    table.free(table.release(first.id))
    table.acquire("c", "lora", ttl_s=5)
    clock.now += 30
    over = table.expired()
    assert [job.name for job in over] == ["b", "c"]
    for job in over:
        table.free(job)
    table.acquire("d", "full")
    with pytest.raises(Busy, match="job 'd' has the server's weights"):
        table.acquire("e", "lora")
    with pytest.raises(JobError, match="no room for adapters"):
        JobTable().acquire("f", "lora")


def test_leases_are_given_in_the_order_in_which_they_were_asked_for():
    """The full job waits for the first LoRA job alone, however many come after it."""
    table = JobTable(max_loras=3)
    first = table.acquire("first", "lora")
    full, lora = table.line_up("full"), table.line_up("lora")
    with pytest.raises(Busy, match="job 'first' has the server's weights"):
        table.acquire("full", "full", place=full)
    for newcomer in (lora, None):  # there is room for them
        with pytest.raises(Busy, match="job 'full' asked before"):
            table.acquire("lora", "lora", place=newcomer)
    table.free(table.release(first.id))
    with pytest.raises(Busy, match="job 'full' asked before"):
        table.acquire("lora", "lora", place=lora)
    job = table.acquire("full", "full", place=full)
    table.leave(full)
    with pytest.raises(Busy, match="job 'full' has the server's weights"):
        table.acquire("lora", "lora", place=lora)
    table.free(table.release(job.id))
    with pytest.raises(Busy, match="job 'lora' asked before"):
        table.acquire("newcomer", "lora")
    table.leave(lora)  # it waits no longer
    assert table.acquire("newcomer", "lora").name == "newcomer"


@pytest.mark.parametrize("change", [{"name": ""}, {"kind": "half"}, {"ttl_s": 0.0}, {"ttl_s": 1e9}])
def test_a_lease_that_makes_no_sense_is_refused(change):
    with pytest.raises(JobError):
        JobTable().acquire(**{"name": "run", **change})
