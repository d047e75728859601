"""Groups in the order in which they end: each is trained on once, none is too old, none is lost."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlalign.config.schema import AlgoConfig, TokenTreeConfig
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams, WeightsLost
from rlalign.trainer import sources
from rlalign.trainer.sources import AsTheyEnd, InOrder
from rlalign.types import Group, Prompt, Sample, Scores, VersionSpan


class Engine:
    """Ends groups in the order that a test says: `end(prompt_id)`, or those of `fast` at once."""

    def __init__(self, fast: Any = lambda prompt_id: True) -> None:
        self.fast = fast
        self.in_flight: list[str] = []
        self._streams: list[tuple[list[GenerateRequest], queue.Queue]] = []

    def stream(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]:
        ends: queue.Queue = queue.Queue()
        self._streams.append((list(requests), ends))
        left = len(requests)
        for i, request in enumerate(requests):
            if self.fast(request.prompt_id):
                left -= 1
                yield i, samples(request)
            else:
                self.in_flight.append(request.prompt_id)
        while left:
            item = ends.get(timeout=10)
            if isinstance(item, Exception):
                raise item
            i = [request.prompt_id for request in requests].index(item)
            left -= 1
            yield i, samples(requests[i])

    def end(self, prompt_id: str) -> None:
        self.in_flight.remove(prompt_id)
        for requests, ends in self._streams:
            if any(request.prompt_id == prompt_id for request in requests):
                ends.put(prompt_id)

    def fail(self, error: Exception) -> None:
        self.in_flight.clear()
        for _, ends in self._streams:
            ends.put(error)


def samples(request: GenerateRequest) -> list[Sample]:
    return [
        Sample(request.prompt_id, request.first_index + i, (seed % 7,), (-1.0,), "stop",
               (VersionSpan(1, 0),))
        for i, seed in enumerate(request.seeds)
    ]  # fmt: skip


class Scorer:
    def score(self, groups: Sequence[Group]) -> Scores:
        count = sum(len(group.samples) for group in groups)
        return Scores(torch.ones(count), torch.ones(count))


def make_job(max_lag: int = 1, oversample: float = 2.0, **progress: Any) -> Any:
    def take(position: int, count: int) -> list[Prompt]:
        return [Prompt(str(p), (5, 6), "") for p in range(position, position + count)]

    rollout = SimpleNamespace(
        max_completion_length=4, temperature=1.0, top_p=1.0, top_k=0, max_lag=max_lag,
        oversample=oversample, server=SimpleNamespace(timeout_s=5.0), tree=TokenTreeConfig(),
    )  # fmt: skip
    return SimpleNamespace(
        config=SimpleNamespace(rollout=rollout, algo=AlgoConfig(num_generations=2), seed=3),
        train_prompts=SimpleNamespace(take=take),
        scorer=Scorer(),
        progress=SimpleNamespace(**{"step": 0, "cursor": 0, "carried": []} | progress),
    )


def ids(collected: Any) -> list[str]:
    return [group.prompt.id for group in collected.groups]


def step(source: AsTheyEnd, job: Any, count: int) -> list[str]:
    taken = ids(source.next(count, job.progress.step, Counter()))
    source.commit()
    job.progress.step += 1
    return taken


def test_a_batch_is_those_that_end_first_and_the_next_one_the_rest():
    job, engine = make_job(), Engine(fast=lambda name: name in ("1", "3"))
    source = AsTheyEnd(job, engine)
    assert step(source, job, 2) == ["1", "3"]
    assert (source.cursor, sorted(source.carried)) == (4, [0, 2])
    for name in ("2", "0"):
        engine.end(name)
    # Two more are begun; those of the first step are due, though others end sooner.
    engine.fast = lambda name: True
    assert sorted(step(source, job, 2)) == ["0", "2"]
    assert (source.cursor, sorted(source.carried)) == (6, [4, 5])


def test_one_that_would_be_too_old_is_waited_for():
    job, engine = make_job(max_lag=1), Engine(fast=lambda name: name != "0")
    source = AsTheyEnd(job, engine)
    assert step(source, job, 2) == ["1", "2"]
    threading.Timer(0.3, engine.end, ("0",)).start()
    assert "0" in step(source, job, 2)


def test_with_a_higher_bound_it_may_take_another_step():
    job, engine = make_job(max_lag=2), Engine(fast=lambda name: name != "0")
    source = AsTheyEnd(job, engine)
    assert "0" not in step(source, job, 2)
    assert "0" not in step(source, job, 2)
    threading.Timer(0.3, engine.end, ("0",)).start()
    assert "0" in step(source, job, 2)


def draw_in_rounds(source: AsTheyEnd, job: Any, engine: Engine, rng: Any, count: int) -> list[str]:
    """A batch in two rounds, as dynamic sampling asks for it; weights may be lost between them."""
    now = job.progress.step
    for _attempt in range(9):
        try:
            batch = ids(source.next(count - 1, now, Counter()))
            if rng.random() < 0.3:
                engine.fail(WeightsLost("gone"))
            batch += ids(source.next(1, now, Counter()))
        except WeightsLost:
            source.rewind()
            continue
        # What is left may go into the next batch: none of it is due now.
        assert all(begun.due > now for begun in source._begun)
        source.commit()
        return batch
    raise AssertionError("lost nine times")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("oversample", [1.0, 1.3, 2.0])
def test_every_prompt_trains_once_whatever_the_order_the_losses_and_the_resumes(seed, oversample):
    """Ends, losses and resumes at random; `trained` must be the training set's own beginning."""
    rng = random.Random(seed)
    max_lag, count = rng.choice((1, 2, 3)), 4
    trained: list[str] = []
    progress: dict[str, Any] = {"step": 0, "cursor": 0, "carried": []}
    for _ in range(3):  # runs, each from the checkpoint of the one before
        job = make_job(max_lag, oversample, **progress)
        engine = Engine(fast=lambda name: rng.random() < 0.5)
        stop = threading.Event()

        def end_some(engine=engine, stop=stop) -> None:
            while not stop.wait(0.002):
                if engine.in_flight and rng.random() < 0.5:
                    engine.end(rng.choice(engine.in_flight))

        ending = threading.Thread(target=end_some)
        ending.start()
        source = AsTheyEnd(job, engine)
        for _ in range(6):
            if rng.random() < 0.3:
                engine.fail(WeightsLost("gone"))
            trained += draw_in_rounds(source, job, engine, rng, count)
            job.progress.step += 1
            progress = {
                "step": job.progress.step, "cursor": source.cursor, "carried": source.carried,
            }  # fmt: skip
        stop.set()
        ending.join()
    assert len(trained) == len(set(trained)) == 3 * 6 * count
    missing = {str(p) for p in range(progress["cursor"])} - set(trained)
    assert missing == {str(p) for p in progress["carried"]}


def test_a_run_resumed_without_oversampling_begins_with_what_was_carried(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(sources, "roll_out", lambda e, s, prompts, *_: seen.extend(prompts))
    job = make_job(cursor=9, carried=[3, 7])
    job.rollout, job.world, job.sampling = None, None, contextlib.nullcontext
    source = InOrder(job)
    source.next(3, 0, Counter())
    source.rewind()  # the weights were lost
    assert (source.cursor, source.carried) == (9, [3, 7])
    seen.clear()
    source.next(3, 0, Counter())
    source.commit()
    source.next(2, 1, Counter())
    source.rewind()
    assert [prompt.id for prompt in seen] == ["3", "7", "9", "10", "11"]  # type: ignore[attr-defined]
    assert (source.cursor, source.carried) == (10, [])


def test_an_engine_that_fails_ends_the_step_with_its_words():
    job, engine = make_job(), Engine(fast=lambda name: False)
    source = AsTheyEnd(job, engine)
    threading.Timer(0.2, engine.fail, (EngineError("the lease ended"),)).start()
    with pytest.raises(EngineError, match="the lease ended"):
        source.next(2, 0, Counter())


def test_a_stream_that_says_nothing_is_given_up_by_name(monkeypatch):
    job, engine = make_job(), Engine(fast=lambda name: False)
    source = AsTheyEnd(job, engine)
    source._timeout_s = 0.2
    with pytest.raises(
        EngineError, match=r"waiting for 2 groups: none of the 4 that are in flight"
    ):
        source.next(2, 0, Counter())
