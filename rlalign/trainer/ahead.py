"""Rollout batches, drawn when they are needed or up to `rollout.max_lag` of them ahead.

With max_lag 0 a step draws its batch and waits for it. With max_lag k a thread draws the batches of
the k steps to come while the trainer trains, so the engine (which must run elsewhere) and the
trainer work at the same time, and a sample is at most k policy versions old when it trains; the
importance weight of algos/mismatch.py corrects for that. A batch that was drawn ahead and not yet
trained on is no part of a checkpoint: a resumed run draws it again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from rlalign import algos
from rlalign.rollout.engine import SamplingParams
from rlalign.trainer.collect import Collected, make_requests, roll_out
from rlalign.trainer.job import Job


@dataclass
class Drawn:
    """One step's groups, and how far the training set was read for them."""

    collected: Collected
    figures: dict[str, float]  # of dynamic sampling
    cursor: int
    generated_tokens: int


def draw(job: Job, step: int, cursor: int) -> Drawn:
    """The groups of `step`; with dynamic sampling, rollout batches until enough carry signal."""
    config = job.config
    params = SamplingParams(
        max_completion_length=config.rollout.max_completion_length,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
    )
    sampler = algos.DynamicSampler(config.trainer.prompts_per_step, config.algo)
    seen: Counter[str] = Counter()
    drawn = Drawn(Collected(), {}, cursor, 0)
    while sampler.needed:
        prompts = job.train_prompts.take(drawn.cursor, sampler.next_prompts)
        drawn.cursor += len(prompts)
        counts = [config.algo.num_generations] * len(prompts)
        requests = make_requests(prompts, counts, config.seed, step, seen)
        with job.sampling():
            batch = roll_out(job.rollout, job.scorer, prompts, requests, params, job.world)
        by_acc = config.algo.filter_groups.metric == "acc"
        values = [score.acc_B if by_acc else score.reward_B for score in batch.scores]
        selection = sampler.feed([value.tolist() for value in values])
        drawn.generated_tokens += batch.generated_tokens
        drawn.collected.extend(batch.select(selection.kept))
    drawn.figures = sampler.metrics()
    return drawn


class RolloutsAhead:
    """The batches of a run, in order, from the step and cursor of `job.progress` on.

    `waited_s` is how long `take` and `settle` have kept the trainer waiting, in all.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._max_lag = job, job.config.rollout.max_lag
        self._step, self._cursor = job.progress.step, job.progress.cursor  # of the next draw
        self._begun = job.progress.step  # steps whose draw is queued, running or done
        self._coming: deque[Future[Drawn]] = deque()
        self._thread = ThreadPoolExecutor(1, "rollouts-ahead") if self._max_lag else None
        self.waited_s = 0.0

    def take(self) -> Drawn:
        """The batch of the next step; those of the steps after it are begun."""
        if self._thread is None:
            began = time.perf_counter()
            drawn = self._next()
            self.waited_s += time.perf_counter() - began
            return drawn
        if not self._coming:
            self._begin()
        drawn = self._wait(self._coming[0])
        self._coming.popleft()
        while len(self._coming) < self._max_lag and self._begin():
            pass
        return drawn

    def settle(self) -> None:
        """Wait for the batch that is being drawn: before an update of the weights, so that it is of
        one version, and before an evaluation."""
        if self._coming:
            self._wait(self._coming[0])

    def close(self) -> None:
        """Begin no more. A draw that runs ends with the engine's lease."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> bool:
        """Queue the next draw; whether there is one."""
        if self._thread is None or self._begun >= self._job.config.trainer.max_steps:
            return False
        self._begun += 1
        self._coming.append(self._thread.submit(self._next))
        return True

    def _next(self) -> Drawn:
        """Runs in the thread, one at a time."""
        self._job.stage(f"rollout of step {self._step + 1}")
        drawn = draw(self._job, self._step, self._cursor)
        self._step, self._cursor = self._step + 1, drawn.cursor
        return drawn

    def _wait(self, future: Future[Drawn]) -> Drawn:
        began = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited_s += time.perf_counter() - began
