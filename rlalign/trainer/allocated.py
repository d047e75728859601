"""Rollouts whose number an allocator decides (GVM, CurES): a pilot, estimates, then what they say.

    shard of prompts -> pilot of N' samples each -> accept rates, gradient norms -> shares
    each step: its prompts and their shares -> rollouts, under the policy of that step

With `allocation.train_on_pilot` the pilot's samples train too, in the first step of the shard, when
the policy is still the one that drew them. They are groups of their own, each weighing
pilot_weight N'/b of a prompt's own group (b: the budget per prompt): a number that was fixed before
anything was drawn, so a mean of both stays that of two unbiased estimates, though the shares depend
on the pilot. Pooled with weights by n_i it would not: a lucky pilot would get fewer companions.

Everything that was generated counts, the pilot included.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from rlalign import algos
from rlalign.rollout.seeds import sample_seed
from rlalign.trainer.batch import make_train_batch
from rlalign.trainer.collect import Collected, make_requests, roll_out
from rlalign.trainer.gradient_norms import norms_of_batch
from rlalign.trainer.job import Job
from rlalign.trainer.sources import sampling_params
from rlalign.types import FINISH_STOP, Group, Prompt, Scores

NO_SCORES = Scores(torch.zeros(0), torch.zeros(0))  # of a group without samples

log = logging.getLogger(__name__)


class Allocated:
    """A `GroupSource` of whole batches in which prompts have samples as the allocator says."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._section = job.config.algo.allocation
        self._allocator = algos.make_allocator(job.config.algo)
        self.cursor = job.progress.cursor
        self._first = self._size = self._left = self._plans = 0  # of the shard
        self._prompts: list[Prompt] = []
        self._pilot = Collected()
        self._figures: dict[str, float] = {}
        if state := job.progress.allocation:
            if state["kind"] == self._section.allocator:
                self._load(state)
            else:
                log.warning(
                    "the shard of allocator=%s ends here: %s begins its own with the prompts that "
                    "are left", state["kind"], self._section.allocator,
                )  # fmt: skip
        self.commit()

    @property
    def carried(self) -> list[int]:
        return []  # the shard is part of `state`

    @property
    def state(self) -> dict[str, Any]:
        """Of the shard, as JSON."""
        shard = {"first": self._first, "size": self._size, "left": self._left, "plans": self._plans}
        kind, allocator = self._section.allocator, self._allocator.state_dict()
        return {"shard": shard, "kind": kind, "allocator": allocator}

    def next(self, count: int, step: int, seen: Counter[str]) -> Collected:
        collected = Collected()
        while len(collected.groups) < count:
            if not self._left:
                self._open_shard(step, seen)
            part = min(self._left, count - len(collected.groups))
            self._left -= part
            self.cursor += part
            collected.extend(self._draw(part, step, seen))
        return collected

    def extra(self) -> Collected:
        """Pilot samples that train in this step, and what a pilot cost."""
        pilot, self._pilot = self._pilot, Collected()
        return pilot

    def figures(self) -> dict[str, float]:
        figures, self._figures = self._figures | self._allocator.metrics(), {}
        return figures

    def commit(self) -> None:
        self._committed = self.cursor, copy.deepcopy(self.state)

    def rewind(self) -> None:
        self.cursor = self._committed[0]
        self._load(self._committed[1])
        self._pilot, self._figures = Collected(), {}

    def _load(self, state: dict[str, Any]) -> None:
        shard = state["shard"]
        self._first, self._size = shard["first"], shard["size"]
        self._left, self._plans = shard["left"], shard["plans"]
        self._prompts = self._job.train_prompts.take(self._first, self._size)
        self._allocator = algos.make_allocator(self._job.config.algo)
        self._allocator.load_state_dict(state["allocator"])

    def _open_shard(self, step: int, seen: Counter[str]) -> None:
        trainer = self._job.config.trainer
        steps = max(1, min(self._section.update_interval, trainer.max_steps - step))
        self._first, self._size = self.cursor, steps * trainer.prompts_per_step
        self._left, self._plans = self._size, 0
        self._prompts = self._job.train_prompts.take(self._first, self._size)
        self._job.stage(f"pilot of {self._size} prompts, before step {step + 1}")
        counts = [self._section.num_pilot_samples] * self._size
        pilot = draw_counts(self._job, self._prompts, counts, step, seen)
        began = time.perf_counter()
        self._allocator.begin(estimate(self._job, pilot))
        self._add_cost(time.perf_counter() - began, pilot.generated_tokens)
        weight = algos.pilot_weight(self._job.config.algo)
        pilot.groups = [dataclasses.replace(group, weight=weight) for group in pilot.groups]
        self._pilot.extend(pilot.select(range(self._size) if self._section.train_on_pilot else []))

    def _add_cost(self, seconds: float, tokens: int) -> None:
        """Of a pilot; dynamic sampling may need several in one step."""
        for name, value in (("time/allocate_s", seconds), ("allocation/pilot_tokens", tokens)):
            self._figures[name] = self._figures.get(name, 0.0) + value

    def _draw(self, count: int, step: int, seen: Counter[str]) -> Collected:
        """The groups of `count` prompts of the shard; those without samples are empty."""
        job = self._job
        seed = sample_seed(job.config.seed, "allocation", self._plans, step)
        self._plans += 1
        shares = self._allocator.plan(count, seed)
        prompts = [self._prompts[i] for i in shares.index_k]
        drawn = draw_counts(job, prompts, shares.count_k, step, seen)
        drawn.groups = [
            dataclasses.replace(group, weight=weight)
            for group, weight in zip(drawn.groups, shares.weight_k, strict=True)
        ]
        right = _accepted(drawn.groups, drawn.all_scores(), job).split(shares.count_k)
        self._allocator.observe(shares, [int(part.sum()) for part in right])
        for _ in range(count - len(drawn.groups)):  # drawn twice: one group of both
            drawn.groups.append(Group(prompts[-1], ()))
            drawn.scores.append(NO_SCORES)
        return drawn


def estimate(job: Job, pilot: Collected) -> algos.PilotStats:
    """Accept rates, and norms of the gradients that the allocator needs."""
    section = job.config.algo.allocation
    scores = pilot.all_scores()
    batch = make_train_batch(pilot.groups, scores, job.config.algo)
    right_B = _accepted(pilot.groups, scores, job)
    chosen_B = batch.mask_BT.bool().any(1)
    if section.allocator == "gvm":
        chosen_B = chosen_B & right_B
    norm_B = torch.ones(len(batch))
    mean_square_m = torch.zeros(len(pilot.groups))
    if section.grad_params != "none":
        at = chosen_B.nonzero()[:, 0]
        set_id_B = torch.where(right_B, batch.group_id_B, -1)[at]
        wants_means = algos.needs_mean_gradients(job.config.algo)
        found = norms_of_batch(
            job.engine,
            batch.rows(at.tolist()),
            job.config,
            job.world,
            section.grad_params or "",
            set_id_B if wants_means else None,
        )
        norm_B = torch.zeros(len(batch)).index_copy(0, at, found.norm_B)
        if section.grad_reduction == "mean":
            norm_B = norm_B / batch.completion_len_B.clamp(min=1)
        if found.mean_squared_K is not None:
            mean_square_m[: len(found.mean_squared_K)] = found.mean_squared_K
    return algos.PilotStats.of_norms(
        norm_B, right_B, batch.group_id_B, len(pilot.groups), mean_square_m
    )


def draw_counts(
    job: Job, prompts: Sequence[Prompt], counts: Sequence[int], step: int, seen: Counter[str]
) -> Collected:
    """Groups in the order of `prompts`, an empty one where the count is 0."""
    at = [i for i, count in enumerate(counts) if count]
    wanted = [prompts[i] for i in at]
    requests = make_requests(wanted, [counts[i] for i in at], job.config.seed, step, seen)
    with job.sampling():
        params = sampling_params(job)
        drawn = roll_out(job.rollout, job.scorer, wanted, requests, params, job.world)
    place = {position: k for k, position in enumerate(at)}
    groups, scores = drawn.groups, drawn.scores
    drawn.groups = [
        groups[place[i]] if i in place else Group(prompt, ()) for i, prompt in enumerate(prompts)
    ]
    drawn.scores = [scores[place[i]] if i in place else NO_SCORES for i in range(len(prompts))]
    return drawn


def _accepted(groups: Sequence[Group], scores: Scores, job: Job) -> torch.Tensor:
    """bool [B]: right, and neither truncated nor given up by the engine."""
    group_id = [i for i, group in enumerate(groups) for _ in group.samples]
    whole = [s.finish_reason == FINISH_STOP for group in groups for s in group.samples]
    return algos.accepted(
        scores.reward_B,
        scores.acc_B,
        torch.tensor(group_id, dtype=torch.long),
        torch.tensor(whole, dtype=torch.bool) & scores.reward_B.isfinite(),
        job.config.algo,
    )
