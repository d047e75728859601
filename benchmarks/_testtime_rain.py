"""RAIN: speed against the published loop, what a tree costs, and what it is worth.

Speed and quality are measured on the language of `_moods.py` (a byte is a token, the model reads
64): a rule says which texts are good. The published loop (`_rain_literal.py`) has the same model,
scorer, embedder and settings, one thread as ours. Its draws are its own, so its trees are others:
seconds are compared for each prompt and for each search. Best-of-N spends at least as many
generated tokens a prompt as RAIN did.

The self-evaluation probe asks the built-in question about its own solved items, of `mini:chain`,
which knows nothing but arithmetic: chance, as it has to be.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _moods import open_moods, pleasant, rows
from _rain_literal import Literal

from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.embed import NGrams
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.question import HARMLESS
from rlalign.testtime.rain import rain
from rlalign.testtime.result import Result
from rlalign.testtime.rewards import FunctionReward
from rlalign.testtime.self_evaluation import SelfEvaluation, probe_accuracy

SPEED, PLAIN, GOOD = 20.0, 65.0, 95.0  # bars: times as fast; % good without and with RAIN
PROMPTS, SHARES = 64, 4


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    engine = open_moods()
    quality, checks = worth(engine, 26 if quick else 104)
    fast, bars = speed(engine, 8 if quick else PROMPTS)
    return {
        "name": "testtime: rain",
        "rows": [*quality, *fast, *probe()],
        "bars": [*checks, *bars],
    }


def speed(engine: HFSearch, num_few: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ours on 64 prompts side by side, the published loop on `num_few` of them one after another, a
    share of them and ours in turn; medians of the pairs."""
    prompts, scorer = rows(PROMPTS), FunctionReward(pleasant)
    few = [prompts[13 * i % PROMPTS] for i in range(num_few)]  # names of either mood in turn
    pairs: dict[str, list[tuple[float, float]]] = {"published loop": [], "official": []}
    shares = SHARES if num_few == PROMPTS else 1  # a share of few prompts is like no other
    for share in range(shares):
        pairs["published loop"].append(published(engine, few[share::shares], share))
        pairs["official"].append(ours(engine, prompts, scorer, "official"))
    pairs["fixed"] = [ours(engine, prompts, scorer, "fixed")]
    found = []
    for side, figures in pairs.items():
        seconds, searches = (statistics.mean(x) for x in zip(*figures, strict=True))
        found.append({
            "part": "speed", "side": side, "s a prompt": seconds, "searches a prompt": searches,
            "ms a search": 1e3 * statistics.mean(s for s, _ in figures) / searches,
        })  # fmt: skip
    both = list(zip(pairs["published loop"], pairs["official"], strict=True))
    by_prompt = [theirs[0] / own[0] for theirs, own in both]
    by_search = [theirs[0] / theirs[1] / (own[0] / own[1]) for theirs, own in both]
    found[1] |= {
        "prompts of the loop": num_few, "times as fast, a prompt": statistics.median(by_prompt),
        "least": min(by_prompt), "times as fast, a search": statistics.median(by_search),
    }  # fmt: skip
    for row in found:
        _say(row)
    least = min(statistics.median(by_prompt), statistics.median(by_search))
    same = float(all_the_same(engine, prompts[::4]))
    return found, [
        _bar("times as fast as the published loop", least, f">= {SPEED}", least >= SPEED),
        _bar("equal answers with 1, 4 and 16 in flight", same, "== 1", same == 1),
    ]


def ours(
    engine: HFSearch, prompts: Sequence[dict[str, Any]], scorer: FunctionReward, compat: str
) -> tuple[float, float]:
    """Seconds and searches a prompt, all prompts in flight."""
    results, took = _timed(
        lambda: rain(engine, prompts, scorer, compat=compat, in_flight=len(prompts))
    )
    searches = sum(result.counters["searches"] for result in results)
    return took / len(prompts), searches / len(prompts)


def all_the_same(engine: HFSearch, prompts: Sequence[dict[str, Any]]) -> bool:
    """Whether the number of trees in flight changes no token."""
    scorer = FunctionReward(pleasant)
    tokens = [
        [result.token_ids for result in rain(engine, prompts, scorer, in_flight=in_flight)]
        for in_flight in (1, 4, 16)
    ]
    return tokens[0] == tokens[1] == tokens[2]


def published(
    engine: HFSearch, prompts: Sequence[dict[str, Any]], seed: int
) -> tuple[float, float]:
    """Seconds and searches a prompt, one prompt after another."""
    ngrams, tokenizer = NGrams(), engine.tokenizer
    ids = [tokenizer(row["prompt"])["input_ids"] for row in prompts]
    loops = [
        Literal(
            engine.model,
            tokenizer,
            lambda text: pleasant([""], [text])[0],
            lambda text: ngrams.embed([text])[0],
            seed=1000 * seed + i,
            room=engine.limits.max_len - len(ids[i]),
        )
        for i in range(len(prompts))
    ]
    _, took = _timed(lambda: [loop.answer(own) for loop, own in zip(loops, ids, strict=True)])
    searches = sum(loop.num_searches for loop in loops)
    _say({
        "published loop": len(loops), "s": took, "searches": searches,
        "forwards a search": sum(loop.forwards for loop in loops) / searches,
        "tokens read a search": sum(loop.token_forwards for loop in loops) / searches,
    })  # fmt: skip
    return took / len(loops), searches / len(loops)


def worth(engine: HFSearch, num: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Good answers, and what they cost."""
    prompts, scorer, found = rows(num), FunctionReward(pleasant), []
    sides: dict[str, Callable[[], list[Result]]] = {
        "greedy": lambda: best_of_n(engine, prompts, scorer, num_samples=1, temperature=0.0),
        "one sample": lambda: best_of_n(engine, prompts, scorer, num_samples=1),
        "RAIN": lambda: rain(engine, prompts, scorer),
        "RAIN, no similarity, no additions": lambda: rain(
            engine, prompts, scorer, gamma_sim=0.0, max_children=0
        ),
        "RAIN, restarts": lambda: rain(engine, prompts, scorer, on_fail="restart"),
        "RAIN, official": lambda: rain(engine, prompts, scorer, compat="official"),
    }
    figures: dict[str, dict[str, Any]] = {}
    for side, decode in sides.items():
        figures[side] = _figures(side, *_timed(decode))
        found.append(figures[side])
        _say(found[-1])
    spent = figures["RAIN"]["tokens generated"]
    samples = math.ceil(spent / figures["one sample"]["tokens generated"])
    control = lambda: best_of_n(engine, prompts, scorer, num_samples=samples)  # noqa: E731
    found.append(_figures(f"best of {samples}", *_timed(control)))
    _say(found[-1])
    for row in found:
        row["times greedy's seconds"] = row["s a prompt"] / figures["greedy"]["s a prompt"]
    plain = max(figures["greedy"]["good %"], figures["one sample"]["good %"])
    good, control_good = figures["RAIN"]["good %"], found[-1]["good %"]
    return found, [
        _bar("good %, greedy or one sample", plain, f"<= {PLAIN}", plain <= PLAIN),
        _bar("good %, RAIN", good, f">= {GOOD}", good >= GOOD),
        _bar(
            "good % of RAIN above best-of-N of as many tokens",
            good - control_good, "> 0", good > control_good,
        ),
    ]  # fmt: skip


def _figures(side: str, results: Sequence[Result], took: float) -> dict[str, Any]:
    committed = sum(len(result.token_ids) for result in results)
    generated = sum(result.num_generated_tokens for result in results)
    searches = [result.counters.get("searches", 0) for result in results]
    return {
        "part": "quality", "side": side,
        "good %": 100 * statistics.mean(result.reward == 1 for result in results),
        "tokens": committed / len(results), "tokens generated": generated / len(results),
        "generated a token": generated / committed, "searches": statistics.mean(searches),
        "s a prompt": took / len(results),
    }  # fmt: skip


def probe() -> list[dict[str, Any]]:
    """How well a mini model judges. The items are the question's own, asked without examples and
    with an instruction of one line: the model reads 512 tokens, and a byte is one."""
    question = dataclasses.replace(HARMLESS, instruction="Is the reply harmless?", examples=())
    engine = open_engine("mini:chain")
    figures = probe_accuracy(engine, SelfEvaluation(engine, question), HARMLESS.examples)
    row = {"part": "probe", "side": "mini:chain", **figures}
    _say(row)
    return [row]


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    value = action()
    return value, time.perf_counter() - began


def _bar(what: str, value: float, bar: str, holds: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": bar, "holds": holds}


def _say(row: dict[str, Any]) -> None:
    print(row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    figures = run("--quick" in sys.argv)
    for bar in figures["bars"]:
        print("yes" if bar["holds"] else "NO ", bar["what"], f"{bar['value']:.4g}", bar["bar"])
