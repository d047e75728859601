"""Properties of dynamic sampling, with a scripted reward."""

from __future__ import annotations

import dataclasses
import itertools

from rlalign.algos import DynamicSampler, SamplingExhausted
from rlalign.config import AlgoConfig
from rlalign.verify.cases import config
from rlalign.verify.table import shared

DAPO = "Yu et al. 2025, arXiv 2503.14476"

# Two of five groups carry signal.
SCRIPT = ([1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0])


def filtering(budget: int, on_exhausted: str = "error") -> AlgoConfig:
    cfg = config("dapo")
    groups = dataclasses.replace(
        cfg.filter_groups, enable=True, max_num_gen_batches=budget, on_exhausted=on_exhausted
    )
    return dataclasses.replace(cfg, filter_groups=groups)


@shared("kept groups have 0 < accuracy < 1, the batch is exactly full", source=DAPO, bound=0.0)
def exact_counts() -> float:
    errors = 0.0
    for target in range(1, 12):
        script = itertools.cycle(SCRIPT)
        sampler = DynamicSampler(target, filtering(budget=100))
        batch: list[list[int]] = []
        generated = 0
        while sampler.needed:
            groups = list(itertools.islice(script, sampler.next_prompts))
            generated += len(groups)
            batch += [groups[i] for i in sampler.feed(groups).kept]
        errors += abs(len(batch) - target)
        errors += sum(not 0 < sum(group) / len(group) < 1 for group in batch)
        errors += abs(sampler.metrics()["sampling/groups_generated"] - generated)
        errors += abs(sampler.metrics()["sampling/groups_used"] - target)
    return errors


@shared("the budget is spent exactly: an error, or the groups found", source=DAPO, bound=0.0)
def bounded_budget() -> float:
    errors = 0.0
    for budget in (1, 3, 7):
        sampler = DynamicSampler(8, filtering(budget))
        rounds, stopped = 0, False
        while sampler.needed and not stopped:
            rounds += 1
            try:
                sampler.feed([[1, 1], [0, 0]])
            except SamplingExhausted:
                stopped = True
        errors += (rounds != budget) + (not stopped)
        lenient = DynamicSampler(8, filtering(budget, "train"))
        found = 0
        while lenient.needed:
            found += len(lenient.feed([[0, 1], [0, 0]]).kept)
        errors += found != min(budget, 8)
    return errors
