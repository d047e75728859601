"""Majority voting (self-consistency, arXiv 2203.11171): of independent samples, those that end in
the commonest answer win. With a reward the votes are weighted by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rlalign.config.testtime import MajorityConfig
from rlalign.rollout.search import Search, SearchEngine
from rlalign.testtime.answers import canonical, make_extract
from rlalign.testtime.best_of_n import Sample, draw_samples, number, why_ended
from rlalign.testtime.prompt import Given, Prompt
from rlalign.testtime.result import Result, make_result
from rlalign.testtime.rewards import Reward
from rlalign.testtime.run import IN_FLIGHT, new_ledger, run_each, settings


def majority(
    engine: SearchEngine,
    prompts: Sequence[Given],
    reward: Reward | None = None,
    config: MajorityConfig | None = None,
    *,
    chat: bool | None = None,
    system: str = "",
    in_flight: int = IN_FLIGHT,
    on_done: Callable[[int, Result], None] | None = None,
    **options: Any,
) -> list[Result]:
    """Draw `num_samples` answers of each prompt and return one with the commonest final answer.
    `options` are those of MajorityConfig. Raises DecodeError or RewardError for a rule `extract`
    that is none.

    >>> majority(engine, ["84-9+8=?"], num_samples=16, extract="tag")          # doctest: +SKIP
    """
    cfg = settings(MajorityConfig, config, options)
    make_extract(cfg.extract)  # a wrong rule is known before anything is drawn
    return run_each(
        engine,
        prompts,
        lambda prompt: search(engine, prompt, reward, cfg),
        chat=chat,
        system=system,
        in_flight=in_flight,
        on_done=on_done,
    )


def search(
    engine: SearchEngine, prompt: Prompt, reward: Reward | None, cfg: MajorityConfig
) -> Search[Result]:
    """Of one prompt. The answers compare by weight, then by the number of their samples, then by
    who was first; of the winner's samples the one with the highest reward is returned, the earliest
    of equals. Samples without an answer do not vote; where none has one, the first is returned."""
    ledger, extract = new_ledger(cfg), make_extract(cfg.extract)
    samples = yield from draw_samples(engine, prompt, reward, cfg, ledger)
    answers = [extract(sample.text) for sample in samples]
    groups: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            groups.setdefault(canonical(answer), []).append(i)
    weights = [vote(sample, reward is not None, cfg.weight) for sample in samples]
    tally = [(sum(weights[i] for i in group), len(group), group) for group in groups.values()]
    tally.sort(key=lambda entry: entry[:2], reverse=True)  # stable: the earliest of equals
    voters = tally[0][2] if tally else [0]
    best = samples[max(voters, key=lambda i: (_rank(samples[i]), -i))]
    ledger.counters["num_without_answer"] = answers.count(None)
    return make_result(
        prompt,
        ledger,
        text=best.text,
        token_ids=best.drawn.ids,
        finish=best.drawn.finish,
        stop_reason=why_ended(ledger, samples, cfg),
        reward=None if reward is None else best.reward,
        trace={
            "method": "majority",
            "answers": [
                {"answer": answers[group[0]], "votes": votes, "samples": group}
                for votes, _, group in tally
            ],
            "samples": [
                {"text": one.text, "reward": number(one.reward), "answer": answer}
                for one, answer in zip(samples, answers, strict=True)
            ],
        },
    )


def vote(sample: Sample, has_reward: bool, weight: str) -> float:
    """What a sample's vote counts: 0 without a score that is a number."""
    if not has_reward:
        return 1.0
    if not math.isfinite(sample.reward):
        return 0.0
    return math.exp(min(sample.reward, 700.0)) if weight == "exp" else max(0.0, sample.reward)


def _rank(sample: Sample) -> float:
    return -math.inf if math.isnan(sample.reward) else sample.reward
