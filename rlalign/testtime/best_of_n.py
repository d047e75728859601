"""Best-of-N: the plainest use of a reward at test time, and what every search is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rlalign.config.testtime import BestOfConfig
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Draw, Drawn, Search, SearchEngine, together
from rlalign.rollout.seeds import sample_seed
from rlalign.testtime.prompt import Given, Prompt, plain_text
from rlalign.testtime.result import Result, make_result
from rlalign.testtime.rewards import Reward
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
    cfg = settings(BestOfConfig, config, options)
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
    """Of one prompt. With a budget of tokens, answers are drawn one after another while it
    lasts."""
    ledger = new_ledger(cfg)
    length = longest(engine, prompt.ids, cfg.max_new_tokens)
    params = SamplingParams(length, cfg.temperature, cfg.top_p, cfg.top_k)
    draws = [
        Draw(prompt.ids, params, sample_seed(cfg.seed, prompt.id, i, 0))
        for i in range(cfg.num_samples)
    ]
    answers: list[Drawn] = []
    at_once = 1 if cfg.max_tokens or cfg.max_wall_s else len(draws)
    while len(answers) < len(draws) and not ledger.over():
        answers += yield from ledger.ask(draws[len(answers) : len(answers) + at_once])
    texts = [plain_text(engine.tokenizer, answer.ids) for answer in answers]
    scores = yield from together([reward(prompt, text, ledger) for text in texts])
    known = [-math.inf if math.isnan(score) else score for score in scores]
    best = known.index(max(known))
    complete = len(answers) == len(draws)
    return make_result(
        prompt,
        ledger,
        text=texts[best],
        token_ids=answers[best].ids,
        finish=answers[best].finish,
        stop_reason="samples" if complete else ledger.over(),
        reward=scores[best],
        trace={"samples": [{"text": t, "reward": s} for t, s in zip(texts, scores, strict=True)]},
    )
