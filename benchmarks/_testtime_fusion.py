"""Logit fusion: what an expert's skill is worth in a larger model, and what the search costs.

Quality: chains of additions (mini:chain), trained here from nothing, three seeds. The large base
and the small base learned the arithmetic and then from demonstrations with mistakes; the expert is
the small base after a few more right ones. Each side answers the same held-out questions, greedy.
Intervals: paired bootstrap over the questions of all seeds.

Speed: random weights of two realistic sizes with a vocabulary of 32,000, one step of all rows, and
what of it is the search for the strengths. The peer computes a softmax of the whole batch at every
strength, as the listing of the paper reads; what is the same at all strengths it computes once, and
like ours it ends at the fused logits. Medians over steps, in milliseconds.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlalign.kernels.alpha_search import fuse, measure, search
from rlalign.models.building import build_once
from rlalign.models.mini import build_mini, recipe_digest
from rlalign.models.random import init_model, small_config
from rlalign.models.tokenizer import build_tokenizer
from rlalign.models.warm_start import warm_start
from rlalign.rollout.hf_fast import FastDecoder
from rlalign.tasks.chain import TASK
from rlalign.tasks.mini import WarmStart
from rlalign.testtime.fusion_models import FusedModel
from rlalign.testtime.logit_fusion import logit_fusion
from rlalign.testtime.open_fusion import open_fusion

GRID = [round(0.1 * i, 10) for i in range(21)]
SHARE = 0.02  # bar: of a step that the search may take
FASTER = 5.0  # bar: than a softmax of the batch at every strength
NOISE = -0.02  # bar: low end of the interval against proxy-tuning
SMALL = {"hidden": 96, "layers": 2, "mlp": 288}
PLAIN, MISTAKEN = TASK.model.phases
AGAIN = WarmStart("right ones again", 60, 1.2e-3, 6e-4, PLAIN.demonstrations)
SIDES = {
    "large base": None, "small base": None, "expert": None,
    "fixed, 0.5": {"alpha_min": 0.5, "alpha_max": 0.5},
    "proxy-tuning": {"alpha_min": 1.0, "alpha_max": 1.0},
    "fixed, 1.5": {"alpha_min": 1.5, "alpha_max": 1.5},
    "fused": {}, "fused, refined": {"alpha_refine": True}, "fused, 4 ahead": {"speculate": 4},
}  # fmt: skip
# Hidden size, layers, width of the MLP and heads, by billions of weights.
LARGE_SHAPES = {0.54: (1536, 20, 4096, 12), 0.86: (2048, 18, 5632, 16)}
SMALL_SHAPE = (640, 12, 1728, 10)  # 0.1
VOCAB, BATCH, CONTEXT = 32_000, 32, 128


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows, bars = quality((0,) if quick else (0, 1, 2), 60 if quick else 200)
    for size in LARGE_SHAPES:
        more, checks = speed(size, 2 if quick else 8)
        rows, bars = rows + more, bars + checks
        gc.collect()  # models may hold themselves in cycles; two sizes at once would be many GiB
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return {
        "name": "testtime_fusion", "machine": machine, "rows": rows, "bars": bars
    }  # fmt: skip


def quality(seeds: Sequence[int], num: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    right: dict[str, list[list[bool]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        paths = {"large": str(build_mini("chain", seed)), "small": str(_small(seed, ()))}
        fused = open_fusion(**paths, experts=[str(_small(seed, (AGAIN,)))])
        large, small, expert = fused.members
        alone = {"large base": large, "small base": small, "expert": expert}
        questions = TASK.make_rows("eval", size=num, seed=seed)
        for side, options in SIDES.items():
            model = fused if options is not None else FusedModel(alone[side], small, [])
            began = time.perf_counter()
            results = logit_fusion(model, questions, max_new_tokens=64, **(options or {}))
            seconds = time.perf_counter() - began
            pairs = zip(questions, results, strict=True)
            right.setdefault(side, []).append(
                [TASK.is_correct(q["prompt"], r.text) for q, r in pairs]
            )
            alphas = [alpha for r in results for alpha in r.trace["alphas"]]
            new = {"part": "quality", "side": side, "alpha": [], "ms a token": []}
            row = rows.setdefault(side, new)
            row["alpha"].append(statistics.mean(alphas))
            row["ms a token"].append(1e3 * seconds / len(alphas))
    for side, row in rows.items():
        per_seed = [statistics.mean(values) for values in right[side]]
        row |= {f"seed {seed}": value for seed, value in zip(seeds, per_seed, strict=True)}
        row["right"] = statistics.mean(per_seed)
        row["alpha"], row["ms a token"] = (statistics.mean(row[x]) for x in ("alpha", "ms a token"))
    answers = {side: np.array(values, float).ravel() for side, values in right.items()}
    gain, low, _ = interval(answers["fused"] - answers["large base"])
    beyond, low_1, high_1 = interval(answers["fused"] - answers["proxy-tuning"])
    rows["fused"] |= {"over large": gain, "over proxy": beyond, "low": low_1, "high": high_1}
    return list(rows.values()), [
        bar("fused over the large base, low end of the interval", low, 0.0, low > 0),
        bar("fused over proxy-tuning (noise allowed)", beyond, NOISE, beyond >= NOISE),
    ]


def _small(seed: int, more: tuple[WarmStart, ...]) -> Path:
    """The small base, or with `more` an expert that was trained from it."""
    recipe = dataclasses.replace(TASK.model, phases=(PLAIN, MISTAKEN, *more), **SMALL)
    task = dataclasses.replace(TASK, model=recipe)

    def write(folder: Path) -> None:
        tokenizer = build_tokenizer(recipe.max_positions)
        warm_start(task, seed, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return build_once(f"fusion-seed{seed}-{recipe_digest(task, seed)}", write)


def interval(difference_N: np.ndarray) -> tuple[float, float, float]:
    """Mean, and 95 % of it by 10,000 resamplings."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(difference_N), (10_000, len(difference_N)))
    low, high = np.quantile(difference_N[picks].mean(1), (0.025, 0.975))
    return float(difference_N.mean()), float(low), float(high)


@torch.inference_mode()
def speed(size: float, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One step of BATCH rows, CONTEXT tokens long, part by part; `size` of the large model, in
    billions of weights."""
    prompts = torch.randint(0, VOCAB, (BATCH, CONTEXT)).tolist()
    shapes = {"large": LARGE_SHAPES[size], "small": SMALL_SHAPE, "expert": SMALL_SHAPE}
    decoders = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        decoders[name] = FastDecoder(_random(shape, seed), CONTEXT + steps + 2)
        decoders[name].admit(prompts, [1] * BATCH)
    times: dict[str, list[float]] = {}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        value = work()
        times.setdefault(part, []).append(1e3 * (time.perf_counter() - began))
        return value

    for step in range(steps + 1):
        tokens = [step] * BATCH
        logits = {
            name: timed(name, lambda d=decoder, t=tokens: d.step(t))
            for name, decoder in decoders.items()
        }
        large, small, expert = logits.values()
        move = timed("targets", lambda s=small, e=expert: measure(s, e, 30.0))
        choice = timed("search", lambda m=large, d=move: search(m, [d], GRID))
        timed("fusion", lambda m=large, d=move, c=choice: fuse(m, [d], c.alpha_BT))
        timed("peer", lambda a=large, b=small, c=expert: by_softmaxes(a, b, c))
    median = {part: statistics.median(values[1:]) for part, values in times.items()}
    ours = sum(median[part] for part in ("targets", "search", "fusion"))
    models = sum(median[name] for name in shapes)
    share = ours / (models + ours)
    row = {
        "part": "speed", "billions": size, "rows": BATCH, "vocabulary": VOCAB, **median,
        "ours": ours, "share": share, "within the bar": share <= SHARE,
        "peer's share": median["peer"] / (models + median["peer"]),
        "over large alone": (models + ours) / median["large"],
    }  # fmt: skip
    faster = median["peer"] / ours
    return [row], [
        bar(f"search, share of a step, {size} billion", share, SHARE, share <= SHARE),
        bar(f"search, times softmaxes, {size} billion", faster, FASTER, faster >= FASTER),
    ]


def by_softmaxes(large_BV: Tensor, small_BV: Tensor, expert_BV: Tensor) -> Tensor:
    """The fused logits: every strength with a softmax and two sums over the vocabulary."""
    m, s, e = (x.log_softmax(-1) for x in (large_BV, small_BV, expert_BV))
    delta, likely = e - s, m.exp()
    forward_B = (e.exp() * delta).sum(-1)
    backward_B = -(s.exp() * delta).sum(-1)
    losses = []
    for alpha in GRID:
        p = torch.add(m, delta, alpha=alpha).log_softmax(-1)
        apart = p - m
        moved_B = (p.exp() * apart).sum(-1) - forward_B
        left_B = -(likely * apart).sum(-1) - backward_B
        losses.append(moved_B**2 + left_B**2)
    alpha_B = torch.tensor(GRID)[torch.stack(losses, -1).argmin(-1)]
    return torch.addcmul(large_BV, delta, alpha_B[:, None])


def _random(shape: tuple[int, int, int, int], seed: int) -> Any:
    hidden, layers, mlp, heads = shape
    config = small_config(
        "qwen2", vocab=VOCAB, hidden=hidden, layers=layers, heads=heads, kv_heads=2, mlp=mlp,
        max_positions=1024, tied=True,
    )  # fmt: skip
    return init_model(config, seed).eval()


def bar(what: str, value: float, wanted: float, holds: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": wanted, "holds": holds}
