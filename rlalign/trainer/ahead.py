"""Rollout batches, drawn when they are needed or ahead of that, while the trainer trains.

With `rollout.max_lag` 0 a step draws its batch and waits for it. With max_lag k a thread draws the
batches of the k steps to come, so the engine (which must run elsewhere) and the trainer work at the
same time, and a sample is at most k policy versions old when it trains; the importance weight of
algos/mismatch.py corrects for that, token by token. With `rollout.oversample` above 1 groups that
are not finished go into a later batch (sources.py): one of the k versions is theirs, and k - 1
batches are drawn ahead. A batch that was drawn ahead and not yet trained on is no part of a
checkpoint: a resumed run draws it again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from rlalign import algos
from rlalign.rollout.engine import WeightsLost
from rlalign.trainer.allocated import Allocated
from rlalign.trainer.collect import Collected
from rlalign.trainer.job import Job
from rlalign.trainer.offline import data_source
from rlalign.trainer.sources import AsTheyEnd, GroupSource, InOrder, StreamingEngine

log = logging.getLogger(__name__)

MAX_RESENDS = 3  # in a row


@dataclass
class Drawn:
    """One step's groups, and how far the training set was read for them."""

    collected: Collected
    figures: dict[str, float]  # of dynamic sampling and allocation
    allocation: dict[str, Any]  # state of the source
    cursor: int
    carried: list[int]  # positions before the cursor that are in no batch yet
    generated_tokens: int


def open_source(job: Job) -> GroupSource:
    if job.config.task.completions != "rollout":
        return data_source(job)
    if job.config.rollout.oversample > 1:
        return AsTheyEnd(job, cast(StreamingEngine, job.rollout))
    if job.config.algo.allocation.allocator != "uniform":
        return Allocated(job)
    return InOrder(job)


def draw(job: Job, step: int, source: GroupSource) -> Drawn:
    """The groups of `step`; with dynamic sampling, rollout batches until enough carry signal."""
    algo = job.config.algo
    sampler = algos.DynamicSampler(job.config.trainer.prompts_per_step, algo)
    seen: Counter[str] = Counter()
    collected, generated_tokens = Collected(), 0
    while sampler.needed:
        batch = source.next(sampler.next_prompts, step, seen)
        by_acc = algo.filter_groups.metric == "acc"
        values = [score.acc_B if by_acc else score.reward_B for score in batch.scores]
        selection = sampler.feed([value.tolist() for value in values])
        generated_tokens += batch.generated_tokens
        collected.extend(batch.select(selection.kept))
    extra = source.extra()
    generated_tokens += extra.generated_tokens
    collected.extend(extra)
    figures = sampler.metrics() | source.figures()
    return Drawn(collected, figures, source.state, source.cursor, source.carried, generated_tokens)


class RolloutsAhead:
    """The batches of a run, in order, from where `job.progress` stands.

    `waited_s` is how long `take`, `settle` and `before_update` have kept the trainer waiting, in
    all. `publish_again` sends the engine the weights that the trainer has: an engine that died may
    need them.
    """

    def __init__(self, job: Job, publish_again: Callable[[], Any]) -> None:
        self._job, self._publish_again = job, publish_again
        rollout = job.config.rollout
        oversampled = rollout.oversample > 1
        self._source = open_source(job)
        self._ahead = rollout.max_lag - oversampled
        self._one_version = rollout.server.in_flight == "wait"
        self._step = job.progress.step  # of the next draw
        self._begun = job.progress.step  # steps whose draw is queued, running or done
        self._coming: deque[Future[Drawn]] = deque()
        self._thread = ThreadPoolExecutor(1, "rollouts-ahead") if self._ahead else None
        self.waited_s = 0.0

    def take(self) -> Drawn:
        """The batch of the next step; those of the steps after it are begun."""
        began = time.perf_counter()
        try:
            drawn = self._take()
        finally:
            self.waited_s += time.perf_counter() - began
        while len(self._coming) < self._ahead and self._begin():
            pass
        return drawn

    def before_update(self) -> None:
        """Wait for the batch that is being drawn, so that it is of one version, unless sequences
        go on under new weights (`rollout.server.in_flight=keep`)."""
        if self._one_version:
            self.settle()

    def settle(self) -> None:
        """Wait for the batches that are begun: scorers and evaluations want to be alone."""
        began = time.perf_counter()
        for future in self._coming:
            future.exception()  # `take` will raise it
        self.waited_s += time.perf_counter() - began

    def close(self) -> None:
        """Begin no more. A draw that runs ends with the engine's lease."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> Drawn:
        for _ in range(MAX_RESENDS):
            try:
                if self._thread is None:
                    return self._next()
                if not self._coming:
                    self._begin()
                return self._coming.popleft().result()
            except WeightsLost as error:
                log.warning("%s", error)
                self._settle_lost()
                self._publish_again()
                if self._thread is not None:  # a draw that failed is done by the next in line
                    failed = range(self._begun - self._step)
                    self._coming += [self._thread.submit(self._next) for _ in failed]
        raise WeightsLost(f"the engine lost its weights {MAX_RESENDS} times in a row")

    def _settle_lost(self) -> None:
        """Those behind the draw that failed have failed too, or will; none of them is drawn."""
        self.settle()
        done = [future for future in self._coming if future.exception() is None]
        self._coming = deque(done)

    def _begin(self) -> bool:
        """Queue the next draw; whether there is one."""
        if self._thread is None or self._begun >= self._job.config.trainer.max_steps:
            return False
        self._begun += 1
        self._coming.append(self._thread.submit(self._next))
        return True

    def _next(self) -> Drawn:
        """One at a time, in the thread if there is one."""
        self._job.stage(f"rollout of step {self._step + 1}")
        try:
            drawn = draw(self._job, self._step, self._source)
        except WeightsLost:
            self._source.rewind()
            raise
        self._source.commit()
        self._step += 1
        return drawn
