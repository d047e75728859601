"""Where the scored groups of a step come from: rollouts of whole batches in the order of the data
set, or groups in the order in which a rollout server finishes them (or the data: offline.py).

Each remembers which prompts of the training set are read (`cursor`) and which of those were begun
and belong to no batch yet (`carried`), which is what a checkpoint needs.
"""

from __future__ import annotations

import functools
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlalign.rollout.engine import (
    EngineError,
    GenerateRequest,
    RolloutEngine,
    SamplingParams,
    WeightsLost,
)
from rlalign.rollout.tree_rollout import grow_trees
from rlalign.trainer.collect import Collected, make_requests, roll_out, scored, shared_out
from rlalign.trainer.job import Job
from rlalign.types import Group, Prompt, Sample

GRACE_S = 60.0  # beyond the deadline of a stream, which says by itself that it is late


class GroupSource(Protocol):
    """`next` gives the scored groups of `count` prompts for the batch of `step`; `seen` counts each
    prompt's samples (or trees) in that batch. `extra`: what belongs to the batch besides, once it
    is full. What was given since the last `commit` comes again after `rewind`."""

    cursor: int

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides positions, as JSON."""
        ...

    @property
    def carried(self) -> list[int]:
        """Positions in the training set."""
        ...

    def next(self, count: int, step: int, seen: Counter[str]) -> Collected: ...
    def extra(self) -> Collected: ...
    def figures(self) -> dict[str, float]: ...
    def commit(self) -> None: ...
    def rewind(self) -> None: ...


def sampling_params(job: Job) -> SamplingParams:
    rollout = job.config.rollout
    return SamplingParams(
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )


class Uniform:
    """What all sources have that give every prompt `num_generations` samples."""

    @property
    def state(self) -> dict[str, Any]:
        return {}

    def extra(self) -> Collected:
        return Collected()

    def figures(self) -> dict[str, float]:
        return {}


class InOrder(Uniform):
    """A batch at a time: every group of it is waited for."""

    def __init__(self, job: Job, engine: RolloutEngine | None = None) -> None:
        self._job, self._engine = job, engine or job.rollout
        self.cursor = job.progress.cursor
        self._carried = list(job.progress.carried)  # of a run that oversampled and was resumed
        self.commit()

    @property
    def carried(self) -> list[int]:
        return list(self._carried)

    def next(self, count: int, step: int, seen: Counter[str]) -> Collected:
        job, prompts = self._job, self._prompts(count)
        if job.config.rollout.tree.num_trees:
            return self._grow(prompts, step, seen)
        counts = [job.config.algo.num_generations] * count
        requests = make_requests(prompts, counts, job.config.seed, step, seen)
        with job.sampling():
            params = sampling_params(job)
            return roll_out(self._engine, job.scorer, prompts, requests, params, job.world)

    def _grow(self, prompts: list[Prompt], step: int, seen: Counter[str]) -> Collected:
        """`seen` counts trees."""
        job, cfg, first_tree = self._job, self._job.config.rollout.tree, []
        for prompt in prompts:
            first_tree.append(seen[prompt.id])
            seen[prompt.id] += cfg.num_trees
        decode = functools.partial(job.tokenizer.decode, skip_special_tokens=True)

        def draw(mine: slice) -> list[Group]:
            return grow_trees(
                self._engine, prompts[mine], first_tree[mine], cfg, sampling_params(job), decode,
                seed=job.config.seed, step=step,
            )  # fmt: skip

        with job.sampling():
            return shared_out(draw, job.scorer, prompts, job.world)

    def _prompts(self, count: int) -> list[Prompt]:
        """The next ones, those carried over first."""
        prompt_set = self._job.train_prompts
        first, self._carried = self._carried[:count], self._carried[count:]
        prompts = [prompt_set.take(position, 1)[0] for position in first]
        prompts += prompt_set.take(self.cursor, count - len(first))
        self.cursor += count - len(first)
        return prompts

    def commit(self) -> None:
        self._committed = self.cursor, self.carried

    def rewind(self) -> None:
        self.cursor, self._carried = self._committed[0], list(self._committed[1])


class StreamingEngine(Protocol):
    """A rollout engine that gives each group when it is finished."""

    def stream(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]: ...


@dataclass(eq=False)
class Begun:
    """A group in flight."""

    position: int
    prompt: Prompt
    due: int  # the last step that may train on it
    samples: tuple[Sample, ...] = ()  # when it is finished


class AsTheyEnd(Uniform):
    """More groups are in flight than a batch needs, `rollout.oversample` times as many; a batch is
    those that are finished first, and the others are carried over, with what they have, to the
    next. One that would be too old later (`rollout.max_lag`) is waited for.
    """

    def __init__(self, job: Job, engine: StreamingEngine) -> None:
        self._job, self._engine, self._params = job, engine, sampling_params(job)
        self.cursor = job.progress.cursor
        self._again = list(job.progress.carried)  # to be begun before new ones
        self._begun: list[Begun] = []  # and in no batch yet
        self._given: list[Begun] = []  # since the last commit
        self._streams: list[threading.Thread] = []
        self._done: list[Begun] = []  # of those, the finished ones, first to last
        self._ended: queue.Queue[tuple[Begun, tuple[Sample, ...]] | Exception] = queue.Queue()
        self._timeout_s = job.config.rollout.server.timeout_s + GRACE_S

    @property
    def carried(self) -> list[int]:
        return [*self._again, *(begun.position for begun in self._begun)]

    def next(self, count: int, step: int, seen: Counter[str]) -> Collected:
        while not self._ended.empty():  # a loss that nobody has seen yet, before more is begun
            self._take_in(self._ended.get())
        wanted = math.ceil(self._job.config.rollout.oversample * count)
        self._begin(wanted - len(self._begun), step, seen)
        began = time.perf_counter()
        chosen = self._wait_for(count, step)
        rollout_s = time.perf_counter() - began
        self._given += chosen
        self._begun = [begun for begun in self._begun if begun not in chosen]
        groups = [Group(begun.prompt, begun.samples) for begun in chosen]
        return scored(groups, self._job.scorer, rollout_s)

    def commit(self) -> None:
        self._given = []

    def rewind(self) -> None:
        self._again = [begun.position for begun in self._given] + self._again
        self._given = []

    def _begin(self, count: int, step: int, seen: Counter[str]) -> None:
        if count <= 0:
            return
        positions, self._again = self._again[:count], self._again[count:]
        new = count - len(positions)
        positions += range(self.cursor, self.cursor + new)
        self.cursor += new
        prompts = [self._job.train_prompts.take(position, 1)[0] for position in positions]
        counts = [self._job.config.algo.num_generations] * count
        requests = make_requests(prompts, counts, self._job.config.seed, step, seen)
        # Its tokens are of the version that the trainer has now, or of later ones.
        due = self._job.progress.step + self._job.config.rollout.max_lag
        begun = [Begun(*pair, due) for pair in zip(positions, prompts, strict=True)]
        self._begun += begun
        thread = threading.Thread(
            target=self._read, args=(begun, requests), name="rollout-stream", daemon=True
        )
        self._streams = [other for other in self._streams if other.is_alive()] + [thread]
        thread.start()

    def _read(self, begun: list[Begun], requests: list[GenerateRequest]) -> None:
        """Runs in a thread of its own."""
        try:
            for i, samples in self._engine.stream(requests, self._params):
                self._ended.put((begun[i], tuple(samples)))
        except Exception as error:
            self._ended.put(error)

    def _wait_for(self, count: int, step: int) -> list[Begun]:
        """Those that must be in this batch, then those that were finished first."""
        late = [begun for begun in self._begun if begun.due <= step]
        while len(self._done) < count or any(begun not in self._done for begun in late):
            try:
                ended = self._ended.get(timeout=self._timeout_s)
            except queue.Empty:
                raise EngineError(
                    f"waiting for {count} groups: none of the {len(self._begun)} that are in "
                    f"flight was finished within {self._timeout_s:g} s"
                ) from None
            self._take_in(ended)
        chosen = [*late, *(begun for begun in self._done if begun not in late)]
        chosen = chosen[: max(count, len(late))]
        self._done = [begun for begun in self._done if begun not in chosen]
        return chosen

    def _take_in(self, ended: tuple[Begun, tuple[Sample, ...]] | Exception) -> None:
        if isinstance(ended, WeightsLost):
            self._lose()
        if isinstance(ended, Exception):
            raise ended
        self._finish(*ended)

    def _finish(self, begun: Begun, samples: tuple[Sample, ...]) -> None:
        if begun in self._begun:  # or it was given up for lost
            begun.samples = samples
            self._done.append(begun)

    def _lose(self) -> None:
        """What was in flight will be begun again; what is finished is finished."""
        for thread in self._streams:
            thread.join(self._timeout_s)
        while not self._ended.empty():
            ended = self._ended.get()
            if not isinstance(ended, Exception):
                self._finish(*ended)
        lost = [begun.position for begun in self._begun if begun not in self._done]
        self._again = lost + self._again
        self._begun = list(self._done)
