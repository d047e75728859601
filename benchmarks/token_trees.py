"""Trees of tokens against flat groups: leaves per second on vLLM, accuracy for generated tokens.

Leaves per second: the longest questions of `mini:chain` (five terms, about 31 tokens each), 32
prompts, one vLLM engine with its prefix cache (blocks of 32). A tree draws a few beginnings up to
the first whole block and shares the leaves out among those that are not over; `align` puts the
split where the cache holds all of a beginning. Sides take turns; medians.

Accuracy: whole trainings on `mini:chain`, 32 prompts a step, flat groups of eight against two trees
of four leaves. Held-out accuracy is read at equal generated tokens, on a line between evaluations.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

import rlalign
from rlalign.config.schema import TokenTreeConfig
from rlalign.rollout.tree_rollout import grow_trees
from rlalign.trainer.build import open_job
from rlalign.trainer.collect import make_requests
from rlalign.trainer.loop import publish_weights
from rlalign.trainer.sources import sampling_params

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROMPTS, BLOCK = 32, 32
SHAPES = ((16, 2), (16, 4), (32, 2))  # leaves of a prompt, beginnings
FLAT = "flat GRPO"
SIDES = {
    FLAT: ("grpo/mini.yaml", []),
    "BranchGRPO": ("branch_grpo/tokens.yaml", []),
    "TreePO": ("tree_po/mini.yaml", []),
}
QUIET = [
    "rollout.engine=hf",
    "trainer.engine=torch",
    "trainer.num_threads=1",
    "tracking.live=false",
]
SPEED, LEAST_GAIN = 1.5, 0.0


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows, bars = leaves_per_second(turns=3 if quick else 9)
    steps, seeds = (10, range(1)) if quick else (60, range(3))
    more, accuracy = trainings(seeds, steps)
    return {
        "name": "token_trees",
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "rows": rows + more,
        "bars": bars + ([] if quick else accuracy),
    }


def leaves_per_second(turns: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rates: dict[tuple[int, int], list[float]] = defaultdict(list)
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = rlalign.load_config(
            CONFIGS / "grpo/mini.yaml",
            [
                "trainer.engine=torch",
                "task.eval=null",
                "task.params={min_terms: 5}",
                "rollout.vllm.max_num_seqs=512",
                f"rollout.vllm.block_size={BLOCK}",
                f"tracking.runs_dir={folder}",
                "tracking.live=false",
            ],
        )
        with open_job(config) as job:
            publish_weights(job, 0)
            params, decode = sampling_params(job), job.tokenizer.decode
            for turn in range(turns + 1):  # the first one warms up
                prompts = job.train_prompts.take(turn * PROMPTS, PROMPTS)
                for leaves in sorted({leaves for leaves, _ in SHAPES}):
                    requests = make_requests(
                        prompts, [leaves] * PROMPTS, job.config.seed, turn, Counter()
                    )
                    with job.sampling():
                        began = time.perf_counter()
                        drawn = job.rollout.generate(requests, params)
                        rates[leaves, 0].append(leaves * PROMPTS / (time.perf_counter() - began))
                    tokens = sum(len(sample.token_ids) for samples in drawn for sample in samples)
                    sizes[leaves, 0] = leaves * PROMPTS, tokens
                for leaves, roots in SHAPES:
                    shape = TokenTreeConfig(
                        num_trees=1,
                        segment_length=20,
                        align=BLOCK,
                        branch_factor=[roots, leaves],
                        max_leaves=leaves,
                    )
                    with job.sampling():
                        began = time.perf_counter()
                        groups = grow_trees(
                            job.rollout, prompts, [0] * PROMPTS, shape, params, decode,
                            seed=job.config.seed, step=turn,
                        )  # fmt: skip
                        seconds = time.perf_counter() - began
                    count = sum(len(group.samples) for group in groups)
                    rates[leaves, roots].append(count / seconds)
                    made = sum(int(g.tree.num_actions_N.sum()) for g in groups if g.tree)
                    sizes[leaves, roots] = count, made
    return _speed_rows(rates, sizes)


def _speed_rows(rates: Any, sizes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, bars = [], []
    for (leaves, roots), found in sorted(rates.items()):
        ratios = [a / b for a, b in zip(found[1:], rates[leaves, 0][1:], strict=True)]
        name = f"{leaves} leaves, " + (f"{roots} beginnings" if roots else "flat")
        rows.append(
            {
                "side": name,
                "leaves/s": statistics.median(found[1:]),
                "/ flat": statistics.median(ratios),
                "leaves": sizes[leaves, roots][0],
                "generated tokens": sizes[leaves, roots][1],
            }
        )
        if roots:
            value = statistics.median(ratios)
            what = f"{name}: leaves/s over flat"
            bars.append(
                {"what": what, "value": value, "bar": f">= {SPEED}", "holds": value >= SPEED}
            )
    return rows, bars


def trainings(seeds: range, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    curves: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    for seed in seeds:
        for side, (config, overrides) in SIDES.items():
            curves[side].append(train(config, [*overrides, f"seed={seed}"], steps))
            print(f"seed {seed} {side}: {curves[side][-1]}", flush=True)
    rows, bars = [], []
    for side, found in curves.items():
        gains, ends = [], []
        for own, flat in zip(found, curves[FLAT], strict=True):
            tokens = min(own[-1][0], flat[-1][0])
            ends.append(at(own, tokens))
            gains.append(at(own, tokens) - at(flat, tokens))
        halves = [
            at(c, c[-1][0] / 2) - at(f, c[-1][0] / 2)
            for c, f in zip(found, curves[FLAT], strict=True)
        ]
        rows.append(
            {
                "side": side,
                "generated tokens": statistics.mean(curve[-1][0] for curve in found),
                "accuracy at flat's or its own last token": _spread(ends),
                "over flat there": _spread(gains),
                "over flat at half of it": _spread(halves),
            }
        )
        if side != FLAT:
            value = statistics.median(gains)
            what = f"{side}: accuracy over flat's at equal tokens, median of {len(gains)} seeds"
            bars.append({"what": what, "value": value, "bar": ">= 0", "holds": value >= LEAST_GAIN})
    return rows, bars


def train(config: str, overrides: list[str], steps: int) -> list[tuple[float, float]]:
    """(generated tokens, held-out accuracy) from the start on, every five steps."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = rlalign.load_config(
            CONFIGS / config,
            [
                *QUIET,
                *overrides,
                f"trainer.max_steps={steps}",
                "trainer.eval_every=5",
                f"tracking.runs_dir={folder}",
            ],
        )
        result = rlalign.train(loaded, quiet=True)
        lines = (result.path / "metrics.jsonl").read_text().splitlines()
    return curve_of([json.loads(line) for line in lines], result.summary)


def curve_of(metrics: list[dict[str, float]], summary: Any) -> list[tuple[float, float]]:
    curve, tokens = [(0.0, summary["eval"]["before"]["pass@1"])], 0.0
    for line in metrics:
        tokens += line["perf/rollout_tokens_per_s"] * line["time/rollout_s"]
        if "eval/mini:chain/pass@1" in line:
            curve.append((tokens, line["eval/mini:chain/pass@1"]))
    return [*curve, (tokens, summary["eval"]["after"]["pass@1"])]


def at(curve: list[tuple[float, float]], tokens: float) -> float:
    """Accuracy after `tokens`, on a line between evaluations."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if tokens <= x1:
            return y0 + (y1 - y0) * (tokens - x0) / max(x1 - x0, 1e-9)
    return curve[-1][1]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
