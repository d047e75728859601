"""Samples where they teach: uniform groups against GVM, CurES and dynamic sampling, at equal
generated tokens (pilots counted) and equal optimizer steps.

Variance of the gradient by resampling on a task of mixed difficulty (_mixed.py, _variance.py), then
whole trainings on `mini:chain`: held-out accuracy for tokens and for seconds.
`python benchmarks/allocation.py RESULT.json PLOT.png` draws a result."""

from __future__ import annotations

import itertools
import json
import math
import platform
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _mixed import CONFIG, QUIET, make_mixed
from _variance import lemma, trained

import rlalign

STEPS, EVERY, REPEATS = 30, 5, 16


def pilot(num_samples: int, budget: int) -> list[str]:
    """Before every step, so that nothing is stale; `rate_prior` keeps prompts of unlucky pilots."""
    settings = {"update_interval": 1, "num_pilot_samples": num_samples, "budget_per_prompt": budget}
    return [f"algo.allocation.{k}={v}" for k, v in {**settings, "rate_prior": 4}.items()]


RAFT = ["algo.loss_type=raft", "algo.prompt_weighting=prompt"]
GRPO = ["algo.loss_type=grpo", "algo.beta=0"]
SIDES: dict[str, list[str]] = {
    "RAFT, 8 each": RAFT,
    "GVM-RAFT, pilot 4 + 4": ["algo.loss_type=gvm_raft", *pilot(4, 4)],
    "RAFT, 4 each": [*RAFT, "algo.num_generations=4"],
    "GVM-RAFT, pilot 2 + 2": ["algo.loss_type=gvm_raft", *pilot(2, 2)],
    "GRPO, 8 each": GRPO,
    "GVM-GRPO, pilot 4 + 4": ["algo.loss_type=gvm_grpo", "algo.beta=0", *pilot(4, 4)],
    "CurES-GRPO, pilot 2 + 6": [
        "algo.loss_type=cures_grpo",
        "algo.beta=0",
        "algo.allocation.num_pilot_samples=2",
        "algo.allocation.budget_per_prompt=6",
    ],
    "GRPO, dynamic sampling": [
        *GRPO,
        "algo.filter_groups.enable=true",
        "algo.filter_groups.on_exhausted=train",
        "trainer.prompts_per_step=24",  # with signal: about as many tokens as 32 without a filter
    ],
}
# What each side is compared with: uniform groups under the same loss and budget.
BASE = {
    "GVM-RAFT, pilot 4 + 4": "RAFT, 8 each",
    "GVM-RAFT, pilot 2 + 2": "RAFT, 4 each",
    "GVM-GRPO, pilot 4 + 4": "GRPO, 8 each",
    "CurES-GRPO, pilot 2 + 6": "GRPO, 8 each",
    "GRPO, dynamic sampling": "GRPO, 8 each",
}
VARIANCE, TOKENS = 0.5, 0.5  # the bars


def run(quick: bool) -> dict[str, Any]:
    seeds, steps, repeats = ((0,), 10, 6) if quick else (range(5), STEPS, REPEATS)
    rows, ratios, curves = [], [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            mixed = make_mixed(Path(folder), seed)
            settings = [f"seed={seed}", *QUIET]
            found = lemma(CONFIG, [*settings, *mixed.settings()], repeats)
            base, gvm = (
                trained(CONFIG, [*settings, *mixed.settings(), *SIDES[side]], repeats)
                for side in ("RAFT, 8 each", "GVM-RAFT, pilot 4 + 4")
            )
            found["pilot with bias"] = found["pilot"] + found["pilot, bias"]
            ratios.append({**found, "trained, pilot counted": gvm / base})
            print(f"seed {seed}: {ratios[-1]}", file=sys.stderr, flush=True)
            for side, extra in SIDES.items():
                run_settings = [*settings, *extra, f"tracking.runs_dir={folder}/runs"]
                curve = train(side, [*run_settings, f"trainer.max_steps={steps}"])
                curves.append({"side": side, "seed": seed, **curve})
                print(side, seed, curve["accuracy"], file=sys.stderr, flush=True)
    for side in SIDES:
        rows.append({"side": side, **summary(side, curves)})
    bars = [variance_bar(name, ratios) for name in WORDING]
    for row in rows:
        if row["side"].startswith("GVM-RAFT"):
            value = row["tokens to uniform's end, share"]
            what = f"{row['side']}: tokens to uniform groups' last accuracy, median share"
            held = {"value": value, "bar": f"<= {TOKENS}", "holds": value <= TOKENS}
            bars.append({"what": what, **held})
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    result = {"name": "allocation", "machine": machine, "rows": rows, "bars": bars}
    return {**result, "variance": ratios, "curves": curves}


def train(side: str, settings: list[str]) -> dict[str, Any]:
    """Held-out accuracy, generated tokens and seconds (without evaluations) after every few
    steps."""
    name = re.sub(r"\W+", "-", side.lower())
    settings = [*settings, f"name={name}", f"trainer.eval_every={EVERY}"]
    config = rlalign.load_config(CONFIG, settings)
    result = rlalign.train(config, quiet=True)
    steps = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((result.path / "result.json").read_text())
    tokens, seconds = 0.0, 0.0
    curve: dict[str, Any] = {"tokens": [0.0], "seconds": [0.0]}
    curve["accuracy"] = [summary["eval"]["before"]["pass@1"]]
    for step in steps:
        tokens += step["perf/rollout_tokens_per_s"] * step["time/rollout_s"]
        seconds += step["time/total_s"]
        found = [value for key, value in step.items() if key.endswith("/pass@1")]
        if step is steps[-1]:
            found = [summary["eval"]["after"]["pass@1"]]
        if found:
            curve["accuracy"].append(found[0])
            curve["tokens"].append(tokens)
            curve["seconds"].append(seconds)
    curve["all tokens"] = summary["generated_tokens"]
    return curve


def summary(side: str, curves: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [curve for curve in curves if curve["side"] == side]
    name = BASE.get(side, side)
    base = {curve["seed"]: curve for curve in curves if curve["side"] == name}
    found: dict[str, Any] = {
        "final accuracy, median": statistics.median(curve["accuracy"][-1] for curve in mine),
        "lowest": min(curve["accuracy"][-1] for curve in mine),
        "highest": max(curve["accuracy"][-1] for curve in mine),
        "tokens, thousands": statistics.mean(curve["all tokens"] for curve in mine) / 1e3,
        "seconds": statistics.mean(curve["seconds"][-1] for curve in mine),
    }
    for key in ("tokens", "seconds"):
        shares = []
        for curve in mine:
            goal = base[curve["seed"]]["accuracy"][-1]
            own, theirs = first_at(curve, key, goal), first_at(base[curve["seed"]], key, goal)
            shares.append(own / theirs)
        found[f"{key} to uniform's end, share"] = statistics.median(shares)
    return found


def first_at(curve: dict[str, Any], key: str, goal: float) -> float:
    """Where the accuracy first reaches `goal`, straight lines between evaluations; inf: never."""
    points = list(zip(curve[key], curve["accuracy"], strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 >= goal:
            return x0 + (x1 - x0) * max(0.0, (goal - y0) / max(y1 - y0, 1e-12))
    return math.inf


WORDING = {
    "pilot": "GVM's gradient variance over uniform's, shares from a pilot of 8 (not counted)",
    "pilot with bias": "the same, with the squared error of giving prompts up",
    "pilot, prior 1": "the same, rate_prior=1: no prompt is given up",
    "known": "the same, shares from known rates and norms",
    "trained, pilot counted": "noise over signal for equal tokens as trained, pilot 4 + 4 counted",
}


def variance_bar(name: str, ratios: list[dict[str, float]]) -> dict[str, Any]:
    values = sorted(ratio[name] for ratio in ratios)
    interval = f"median of {len(values)} seeds, {values[0]:.2f} to {values[-1]:.2f}"
    middle = statistics.median(values)
    what = f"{WORDING[name]}; {interval}"
    return {"what": what, "value": middle, "bar": f"<= {VARIANCE}", "holds": middle <= VARIANCE}


def plot(result: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axis, key in zip(axes, ("tokens", "seconds"), strict=True):
        for number, side in enumerate(SIDES):
            mine = [curve for curve in result["curves"] if curve["side"] == side]
            count = min(len(curve[key]) for curve in mine)
            middle = [
                [statistics.median(curve[what][i] for curve in mine) for i in range(count)]
                for what in (key, "accuracy")
            ]
            axis.plot(*middle, color=f"C{number}", label=side, marker=".")
        axis.set_xlabel(f"generated {key}, pilots counted" if key == "tokens" else key)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, median over seeds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
