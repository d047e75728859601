"""LatentSeek: its cost beside the published loop, and what it is worth on the mini model.

Speed: a random model whose answers do not end before 300 tokens, several prompts, a reward that
costs nothing and accepts nothing: decoding is all there is. Both sides keep latents in float32, so
that they take the same path. Token-forwards are tokens that go through the transformer; ours are
counted as if no prompt were ever cached.

Quality: held-out questions of mini:chain. The oracle knows the answer: what it accepts says how far
the search reaches, not what a user gets, so its rows are compared with other oracle rows only. The
self reward is the share of `VOTERS` samples of the same question that end in the same answer,
less one: no label. Samples are drawn once a question and count as tokens of the search.
`random signs` keeps all of the search but the gradient, and has its own lr, which spends as many
tokens. Best-of-N (by the oracle, or by the self reward with its voters' tokens counted) and
majority (no label) spend the tokens of a search on samples at temperature 1. Intervals: paired
bootstrap over questions.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from _latent_literal import Literal, literal_seek

from rlalign.config.schema import ModelConfig
from rlalign.models.load import load_causal_lm, load_tokenizer
from rlalign.models.random import write_random_model
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Draw, Search, SearchEngine
from rlalign.rollout.search_hf import HFSearch
from rlalign.rollout.seeds import sample_seed
from rlalign.tasks.mini import get_mini_task
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.latent_seek import latent_seek
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.prompt import Prompt, plain_text
from rlalign.testtime.result import Result
from rlalign.testtime.rewards import FunctionReward, Reward

SPEED, FORWARDS, GAIN = 20.0, 50.0, 0.05  # bars
LENGTH, STEPS = 300, 2
LOOP = {"rho": 0.2, "lr": 0.1, "max_steps": STEPS, "max_new_tokens": LENGTH}
MINI = {"rho": 0.5, "lr": 0.1, "max_steps": 10, "max_new_tokens": 64}  # configs/latent_seek/mini
RANDOM = {"proposal": "random_signs", "lr": 2.0}  # the best lr on training questions, as MINI's
VOTERS = 4
TASK = get_mini_task("chain")
ANSWER = re.compile(r"<answer>(-?\d+)</answer>")


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows, bars = speed(4 if quick else 8, 1 if quick else 3)
    more, checks = quality(100 if quick else 500)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    rows, bars = rows + more, bars + checks
    return {"name": "testtime_latent", "machine": machine, "rows": rows, "bars": bars}


def speed(num_prompts: int, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Seconds and token-forwards of the two on the same prompts, at the same steps."""
    engine, model = endless(hidden=128, layers=3)
    texts = [f"{i}. What is {3 * i}+{7 * i}?" for i in range(num_prompts)]
    prompts = [tuple(engine.tokenizer(text)["input_ids"]) for text in texts]
    latent_seek(engine, prompts[:1], Never(), **LOOP | {"max_steps": 1, "max_new_tokens": 20})
    ours_s, theirs_s, ours, theirs = [], [], [], []
    for _ in range(repeats):
        began = time.perf_counter()
        ours = latent_seek(engine, prompts, Never(), select="last", **LOOP)
        ours_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        theirs = [literal(engine, model, prompt) for prompt in prompts]
        theirs_s.append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(theirs_s, ours_s, strict=True))
    ours_tokens = sum(r.num_prefill_tokens + r.num_generated_tokens for r in ours)
    theirs_tokens = sum(found.token_forwards for found in theirs)
    same = [a.token_ids == b.answers[-1] for a, b in zip(ours, theirs, strict=True)]
    common = {"part": "speed", "prompts": num_prompts, "steps": STEPS}
    rows = [
        {
            **common, "side": "ours", "seconds a prompt": statistics.median(ours_s) / num_prompts,
            "token-forwards a prompt": ours_tokens / num_prompts,
            "repeated steps": sum(r.counters["repeats"] for r in ours),
            "same last answer": statistics.mean(same),
        },
        {
            **common, "side": "published loop",
            "seconds a prompt": statistics.median(theirs_s) / num_prompts,
            "token-forwards a prompt": theirs_tokens / num_prompts,
        },
    ]  # fmt: skip
    for row in rows:
        print(row, file=sys.stderr, flush=True)
    less = theirs_tokens / ours_tokens
    return rows, [
        _bar(f"LatentSeek against the published loop, {LENGTH} tokens: seconds", ratio, SPEED),
        _bar(f"LatentSeek against the published loop, {LENGTH} tokens: forwards", less, FORWARDS),
    ]


def literal(engine: SearchEngine, model: Any, prompt: Sequence[int]) -> Literal:
    options: dict[str, Any] = {**LOOP, "eos_ids": engine.eos_ids, "dtype": torch.float32}
    return literal_seek(model, prompt, lambda answer: -1.0, **options)


def endless(hidden: int, layers: int) -> tuple[HFSearch, Any]:
    """A random model that never says the end token: its logit is 0, and some other is above."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(
            folder, "qwen2", hidden=hidden, layers=layers, mlp=3 * hidden, tied=False
        )
        config = ModelConfig(path=folder, dtype="float32")
        model, tokenizer = load_causal_lm(config, 0, "cpu"), load_tokenizer(config)
    engine = HFSearch(model, tokenizer)
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[[*engine.eos_ids]] = 0
    return engine, model


class Never:
    """`Reward`: refuses every answer."""

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[float]:
        yield from ledger.ask([])
        return -1.0


class Agreement:
    """`Reward` of the model's own: the share of its samples that end as the answer does, less 1."""

    def __init__(self, engine: SearchEngine) -> None:
        self._engine = engine
        self._votes: dict[str, Counter[str]] = {}

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[float]:
        if prompt.id not in self._votes:
            drawn = yield from ledger.ask(voters(prompt.id, prompt.ids))
            self._count(prompt.id, drawn)
        ledger.num_reward_calls += 1
        answer = final(response)
        return self._votes[prompt.id][answer] / VOTERS - 1 if answer else -1.0

    def ask_all(self, ids: Mapping[str, tuple[int, ...]]) -> int:
        """Draw the votes on these prompts now, as several answers to one are judged at once; the
        tokens of all."""
        draws = [draw for name, prompt in ids.items() for draw in voters(name, prompt)]
        drawn = self._engine.answer(draws)
        for i, name in enumerate(ids):
            self._count(name, drawn[i * VOTERS : (i + 1) * VOTERS])
        return sum(len(reply.ids) for reply in drawn)

    def _count(self, name: str, drawn: Sequence[Any]) -> None:
        texts = [plain_text(self._engine.tokenizer, reply.ids) for reply in drawn]
        self._votes[name] = Counter(map(final, texts))


def voters(name: str, prompt: tuple[int, ...]) -> list[Draw]:
    params = SamplingParams(MINI["max_new_tokens"])
    return [Draw(prompt, params, sample_seed(1, name, i, 0)) for i in range(VOTERS)]


def final(text: str) -> str:
    """The answer in a text; "": none."""
    found = ANSWER.search(text)
    return found[1] if found else ""


def quality(num: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accuracy on held-out questions."""
    engine = open_engine("mini:chain")
    given = [{**row, "id": row["prompt"]} for row in TASK.make_rows("eval", size=num)]
    ids = [tuple(engine.tokenizer(row["prompt"])["input_ids"]) for row in given]

    def oracle(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [float(TASK.is_correct(prompt, text)) - 1 for prompt, text in pairs]

    sides: dict[str, tuple[list[Result], float]] = {}
    spent: dict[str, float] = {}  # tokens of a question that are in no result

    def seek(side: str, reward: Reward, **options: Any) -> None:
        began = time.perf_counter()
        results = latent_seek(engine, given, reward, in_flight=num, **MINI | options)
        sides[side] = results, time.perf_counter() - began

    def sample(side: str, reward: Reward, like: str) -> None:
        began, beside = time.perf_counter(), 0
        count = _count(sides[like][0], greedy_tokens)
        if isinstance(reward, Agreement):
            names = [row["id"] for row in given]
            beside = reward.ask_all(dict(zip(names, ids, strict=True))) / num
            count -= VOTERS
        results = best_of_n(
            engine, given, reward, num_samples=count,
            max_new_tokens=MINI["max_new_tokens"], in_flight=num,
        )  # fmt: skip
        spent[side] = beside
        sides[side] = results, time.perf_counter() - began

    with FunctionReward(oracle) as knows:
        seek("greedy", knows, max_steps=0)
        greedy_tokens = _tokens(sides["greedy"][0])
        seek("LatentSeek, oracle", knows, oracle=True)
        seek("random signs, oracle", knows, oracle=True, **RANDOM)
        sample("best of N, oracle", knows, "LatentSeek, oracle")
    # An answer is accepted when all voters end in it.
    seek("LatentSeek, self", Agreement(engine), tau=-1 / (2 * VOTERS))
    sample("best of N, self", Agreement(engine), "LatentSeek, self")
    rows = [_row(side, *found, given, sides["greedy"][0]) for side, found in sides.items()]
    for like in ("LatentSeek, oracle", "LatentSeek, self"):
        count = _count(sides[like][0], greedy_tokens)
        rows.append(_majority(engine, ids, given, count, f"majority, tokens of {like}"))
    for row in rows:
        row["tokens"] += spent.get(row["side"], 0)
        print(row, file=sys.stderr, flush=True)
    right = {row["side"]: row["right"] for row in rows}
    gain = right["LatentSeek, oracle"] - right["greedy"]
    return rows, [_bar("LatentSeek with the oracle above greedy, mini:chain", gain, GAIN)]


def _count(results: Sequence[Result], greedy_tokens: float) -> int:
    """How many samples cost what a search did, at least."""
    return math.ceil(_tokens(results) / greedy_tokens)


def _tokens(results: Sequence[Result]) -> float:
    return statistics.mean(result.num_generated_tokens for result in results)


def _row(
    side: str,
    results: Sequence[Result],
    seconds: float,
    given: Sequence[dict[str, Any]],
    greedy: Sequence[Result],
) -> dict[str, Any]:
    right_N, base_N = (_right([r.text for r in found], given) for found in (results, greedy))
    low, high = _interval(right_N - base_N)
    return {
        "part": "quality", "side": side, "right": float(right_N.mean()), "low": low, "high": high,
        "tokens": _tokens(results), "engine calls": _mean(r.num_engine_calls for r in results),
        "judged": _mean(r.num_reward_calls for r in results),
        "steps": _mean(r.counters.get("steps", 0) for r in results),
        "repeated steps": _mean(r.counters.get("repeats", 0) for r in results),
        "ms a question": 1e3 * seconds / len(results),
    }  # fmt: skip


def _majority(
    engine: SearchEngine,
    ids: Sequence[tuple[int, ...]],
    given: Sequence[dict[str, Any]],
    count: int,
    side: str,
) -> dict[str, Any]:
    """The answer that most of `count` samples end in; of equals the earliest."""
    params = SamplingParams(MINI["max_new_tokens"])
    draws = [
        Draw(prompt, params, sample_seed(0, row["id"], i, 0))
        for prompt, row in zip(ids, given, strict=True)
        for i in range(count)
    ]
    began = time.perf_counter()
    drawn = engine.answer(draws)
    seconds = time.perf_counter() - began
    texts = [plain_text(engine.tokenizer, reply.ids) for reply in drawn]
    chosen = []
    for start in range(0, len(texts), count):
        own = texts[start : start + count]
        votes = Counter(answer for answer in map(final, own) if answer)
        best = votes.most_common(1)[0][0] if votes else ""
        chosen.append(next(text for text in own if final(text) == best))
    return {
        "part": "quality", "side": side, "right": float(_right(chosen, given).mean()),
        "tokens": sum(len(reply.ids) for reply in drawn) / len(given),
        "ms a question": 1e3 * seconds / len(given), "samples": count,
    }  # fmt: skip


def _right(texts: Sequence[str], given: Sequence[dict[str, Any]]) -> np.ndarray:
    pairs = zip(given, texts, strict=True)
    return np.array([float(TASK.is_correct(row["prompt"], text)) for row, text in pairs])


def _mean(values: Any) -> float:
    return statistics.mean(map(float, values))


def _interval(difference_N: np.ndarray) -> tuple[float, float]:
    """95 % of the mean, by 10,000 resamplings of the questions."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(difference_N), (10_000, len(difference_N)))
    low, high = np.quantile(difference_N[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _bar(what: str, value: float, bar: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": f">= {bar}", "holds": value >= bar}
