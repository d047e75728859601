"""Groups whose completions the data brings along: alone, or beside samples of the policy.

Both go through the data set in the order of `InOrder`, so a resumed run gets the same batches.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch

from rlalign.rollout.engine import GenerateRequest, RolloutEngine, SamplingParams
from rlalign.tasks import ScoredSet
from rlalign.trainer.collect import Collected
from rlalign.trainer.job import Job
from rlalign.trainer.sources import InOrder
from rlalign.types import Sample, Scores


def data_source(job: Job) -> InOrder:
    """The groups that `task.completions` dataset or mixed says."""
    return Mixed(job) if job.samples_policy else FromData(job)


class FromData(InOrder):
    """The data's groups with the data's scores: nothing is sampled or scored."""

    def next(self, count: int, step: int, seen: Counter[str]) -> Collected:
        assert self._job.scored is not None
        chosen = [self._job.scored[prompt.id] for prompt in self._prompts(count)]
        return Collected([entry.group for entry in chosen], [entry.scores for entry in chosen])


class Mixed(InOrder):
    """Samples of the policy, then the data's completions: one group a prompt.

    The reward functions score both, unless `task.scored.rescore` is false: then the data's
    completions keep their scores, and `score_transform` goes over those of the functions too, so
    that all rewards are still values of one function.
    """

    def __init__(self, job: Job) -> None:
        assert job.scored is not None
        self._scored = job.scored
        # All that a rollout asks of an engine is to generate.
        super().__init__(job, cast(RolloutEngine, _WithData(job.rollout, job.scored)))

    def next(self, count: int, step: int, seen: Counter[str]) -> Collected:
        collected = super().next(count, step, seen)
        entries = [self._scored[group.prompt.id] for group in collected.groups]
        collected.groups = [
            dataclasses.replace(group, weight=entry.group.weight)
            for group, entry in zip(collected.groups, entries, strict=True)
        ]
        if not self._job.config.task.scored.rescore:
            collected.scores = [
                self._with_given(scores, entry.scores)
                for scores, entry in zip(collected.scores, entries, strict=True)
            ]
        return collected

    def _with_given(self, scores: Scores, given: Scores) -> Scores:
        sampled_B = scores.reward_B[: -len(given.reward_B)]
        reward_B = torch.cat([self._scored.transform(sampled_B), given.reward_B])
        return dataclasses.replace(scores, reward_B=reward_B)


class _WithData:
    """An engine whose samples of a prompt are followed by the data's."""

    def __init__(self, engine: RolloutEngine, scored: ScoredSet) -> None:
        self._engine, self._scored = engine, scored

    def generate(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> list[list[Sample]]:
        drawn = self._engine.generate(requests, params)
        return [
            [*samples, *self._scored[request.prompt_id].group.samples]
            for request, samples in zip(requests, drawn, strict=True)
        ]
