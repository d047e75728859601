"""Prompts to scored groups: roll out, score, exchange between processes, keep what carries signal.

Every process rolls out its own share of the prompts and then sees the groups of all of them, so the
decisions that follow (advantages, denominators, which groups are kept) are the same everywhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlalign.rewards import Scorer
from rlalign.rollout.engine import GenerateRequest, RolloutEngine, SamplingParams
from rlalign.rollout.seeds import sample_seed
from rlalign.trainer import wire
from rlalign.trainer.distributed import World
from rlalign.types import Group, Prompt, Scores


@dataclass
class Collected:
    """Groups of one or more rollout batches with one score per sample, in order."""

    groups: list[Group] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)  # one entry a group, without error counts
    errors: Counter[str] = field(default_factory=Counter)  # failed verdicts by kind, as below
    rollout_s: float = 0.0
    reward_s: float = 0.0
    generated_tokens: int = 0  # of all groups rolled out, kept or not; not those of the data

    def figures(self) -> dict[str, Any]:
        """All but the groups and their scores."""
        return {
            "rollout_s": self.rollout_s,
            "reward_s": self.reward_s,
            "generated_tokens": self.generated_tokens,
            "errors": dict(self.errors),
        }

    def select(self, indices: Sequence[int]) -> Collected:
        """These groups only; times, generated tokens and errors stay those of the whole rollout."""
        groups, scores = [self.groups[i] for i in indices], [self.scores[i] for i in indices]
        return dataclasses.replace(self, groups=groups, scores=scores)

    def extend(self, other: Collected) -> None:
        self.groups += other.groups
        self.scores += other.scores
        self.errors += other.errors
        self.rollout_s += other.rollout_s
        self.reward_s += other.reward_s
        self.generated_tokens += other.generated_tokens

    def all_scores(self) -> Scores:
        """The scores of all samples, one row a sample, with the errors of all rolled out."""
        scores = [s for s in self.scores if len(s.reward_B)]  # the others name no functions
        if not scores:
            return Scores(torch.zeros(0), torch.zeros(0), errors=dict(self.errors))
        names = scores[0].by_function
        return Scores(
            reward_B=torch.cat([s.reward_B for s in scores]),
            acc_B=torch.cat([s.acc_B for s in scores]),
            by_function={n: torch.cat([s.by_function[n] for s in scores]) for n in names},
            errors=dict(self.errors),
        )


def make_requests(
    prompts: Sequence[Prompt], counts: Sequence[int], seed: int, step: int, seen: Counter[str]
) -> list[GenerateRequest]:
    """`counts[i]` samples of prompt i. A prompt that comes again within a step (`seen` counts its
    samples so far and is updated) goes on numbering where it stopped, so no two samples share a
    seed."""
    requests = []
    for prompt, count in zip(prompts, counts, strict=True):
        first = seen[prompt.id]
        seen[prompt.id] += count
        seeds = tuple(sample_seed(seed, prompt.id, first + i, step) for i in range(count))
        requests.append(GenerateRequest(prompt.id, prompt.token_ids, seeds, first))
    return requests


def roll_out(
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    requests: Sequence[GenerateRequest],
    params: SamplingParams,
    world: World,
) -> Collected:
    """Sample and score `requests` (request i belongs to prompt i), each process its share: see
    `shared_out`."""

    def draw(mine: slice) -> list[Group]:
        samples = engine.generate(requests[mine], params)
        return [Group(p, tuple(s)) for p, s in zip(prompts[mine], samples, strict=True)]

    return shared_out(draw, scorer, prompts, world)


def shared_out(
    draw: Callable[[slice], list[Group]], scorer: Scorer, prompts: Sequence[Prompt], world: World
) -> Collected:
    """`draw` and score a group of each prompt, each process its slice of them.

    Every process returns the groups of all, in the order of `prompts`, and fails when one of them
    does (`World.agreed`).
    """
    with world.agreed("rollout"):
        start = time.perf_counter()
        groups = draw(slice(world.rank, None, world.size))
        local = scored(groups, scorer, time.perf_counter() - start)
    if world.size == 1:
        return local
    mine_encoded = wire.encode(local.groups, local.scores, local.figures())
    parts = []
    for r, payload in enumerate(world.all_gather_bytes(mine_encoded, "rollout exchange")):
        groups, scores, figures = wire.decode(payload, prompts[r :: world.size])
        errors = Counter(figures.pop("errors"))
        parts.append(Collected(groups, scores, errors, **figures))
    whole = Collected(
        rollout_s=max(part.rollout_s for part in parts),
        reward_s=max(part.reward_s for part in parts),
        generated_tokens=sum(part.generated_tokens for part in parts),
        errors=sum((part.errors for part in parts), Counter()),
    )
    for i in range(len(prompts)):
        whole.groups.append(parts[i % world.size].groups[i // world.size])
        whole.scores.append(parts[i % world.size].scores[i // world.size])
    return whole


def scored(groups: list[Group], scorer: Scorer, rollout_s: float) -> Collected:
    """Score groups that took `rollout_s` to draw."""
    start = time.perf_counter()
    scores = scorer.score(groups)
    return Collected(
        groups,
        split_scores(scores, [len(group.samples) for group in groups]),
        Counter(scores.errors),
        rollout_s=rollout_s,
        reward_s=time.perf_counter() - start,
        generated_tokens=sum(_generated_tokens(group) for group in groups),
    )


def _generated_tokens(group: Group) -> int:
    if group.tree is not None:
        return int(group.tree.num_actions_N.sum())
    return sum(len(sample.token_ids) for sample in group.samples if not sample.source_id)


def split_scores(scores: Scores, sizes: Sequence[int]) -> list[Scores]:
    """One `Scores` a group, without the error counts, which belong to the batch."""
    rewards, accs = scores.reward_B.split(list(sizes)), scores.acc_B.split(list(sizes))
    functions = {name: value.split(list(sizes)) for name, value in scores.by_function.items()}
    return [
        Scores(
            reward_B=rewards[i],
            acc_B=accs[i],
            by_function={name: value[i] for name, value in functions.items()},
        )
        for i in range(len(sizes))
    ]
