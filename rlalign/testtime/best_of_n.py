"""Best-of-N: the plainest use of a reward at test time, and what every search is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlalign.config.testtime import BestOfConfig
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Draw, Drawn, Search, SearchEngine, together
from rlalign.rollout.seeds import sample_seed
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Given, Prompt, plain_text
from rlalign.testtime.result import Result, make_result
from rlalign.testtime.rewards import Reward, checked_reward
from rlalign.testtime.run import IN_FLIGHT, longest, new_ledger, run_each, settings


def best_of_n(
    engine: SearchEngine,
    prompts: Sequence[Given],
    reward: Reward,
    config: BestOfConfig | None = None,
    *,
    chat: bool | None = None,
    system: str = "",
    in_flight: int = IN_FLIGHT,
    on_done: Callable[[int, Result], None] | None = None,
    **options: Any,
) -> list[Result]:
    """Draw `num_samples` answers of each prompt and keep the one with the highest reward, the
    earliest of equals; answers without a score come last. `options` are those of BestOfConfig.

    >>> best_of_n(engine, ["84-9+8=?"], reward, num_samples=4)                 # doctest: +SKIP
    """
    cfg, reward = settings(BestOfConfig, config, options), checked_reward(reward)
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
    engine: SearchEngine, prompt: Prompt, reward: Reward, cfg: BestOfConfig
) -> Search[Result]:
    """Of one prompt."""
    ledger = new_ledger(cfg)
    samples = yield from draw_samples(engine, prompt, reward, cfg, ledger)
    known = [-math.inf if math.isnan(sample.reward) else sample.reward for sample in samples]
    best = samples[known.index(max(known))]
    return make_result(
        prompt,
        ledger,
        text=best.text,
        token_ids=best.drawn.ids,
        finish=best.drawn.finish,
        stop_reason=why_ended(ledger, samples, cfg),
        reward=best.reward,
        trace={
            "method": "best_of_n",
            "samples": [{"text": one.text, "reward": number(one.reward)} for one in samples],
        },
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer; `reward` is NaN where it has none."""

    text: str
    drawn: Drawn
    reward: float


def draw_samples(
    engine: SearchEngine,
    prompt: Prompt,
    reward: Reward | None,
    cfg: BestOfConfig,
    ledger: Ledger,
) -> Search[list[Sample]]:
    """`num_samples` answers, all at once. With a budget they are drawn and scored one after
    another while it lasts: at least one, the last of them perhaps cut off by it."""
    length = longest(engine, prompt.ids, cfg.max_new_tokens)
    at_once = 1 if cfg.max_tokens or cfg.max_wall_s else cfg.num_samples
    samples: list[Sample] = []
    while len(samples) < cfg.num_samples and not (samples and ledger.over()):
        left = ledger.left(length)
        params = SamplingParams(left, cfg.temperature, cfg.top_p, cfg.top_k)
        first = len(samples)
        seeds = [sample_seed(cfg.seed, prompt.id, first + i, 0) for i in range(at_once)]
        drawn = yield from ledger.ask([Draw(prompt.ids, params, seed) for seed in seeds])
        ledger.cuts(drawn, left, length)
        texts = [plain_text(engine.tokenizer, one.ids) for one in drawn]
        scores = [math.nan] * len(texts)
        if reward is not None:
            scores = yield from together([reward(prompt, text, ledger) for text in texts])
        samples += map(Sample, texts, drawn, scores)
    return samples


def why_ended(ledger: Ledger, samples: Sequence[Sample], cfg: BestOfConfig) -> str:
    """ "samples" where all were drawn, and whole; otherwise the budget."""
    all_there = len(samples) == cfg.num_samples and not ledger.was_cut
    return "samples" if all_there else ledger.over()


def number(value: float) -> float | None:
    """As JSON has it: null for what is no finite number."""
    return value if math.isfinite(value) else None
