"""Training that does not wait for its rollouts, against the synchronous loop on the same server:
tokens a second and what is learned, over three seeds of `configs/grpo/mini.yaml`.

A real `rlalign serve` with one thread and a trainer with one thread; `rollout.max_lag` 0, 1 with
updates that wait, 1 with updates that do not (`in_flight=keep`), and 2 with groups that are carried
over (`oversample=1.25`)."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _serving import serving

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "grpo" / "mini.yaml"
KEEP = "rollout.server.in_flight=keep"
SIDES = {
    "synchronous": [],
    "max_lag=1": ["rollout.max_lag=1"],
    "max_lag=1, keep": ["rollout.max_lag=1", KEEP],
    "max_lag=2, keep, oversample=1.25": ["rollout.max_lag=2", KEEP, "rollout.oversample=1.25"],
}
GAIN, POINTS = 1.25, 0.03  # the bars
TIMEOUT_S = 1200.0


def run(quick: bool) -> dict[str, Any]:
    seeds, options = ((0,), ["trainer.max_steps=20"]) if quick else ((0, 1, 2), [])
    rows, bars = [], []
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for seed in seeds:
        with serving("mini:chain", f"seed={seed}") as name, tempfile.TemporaryDirectory() as runs:
            for side, settings in SIDES.items():
                on_it = [f"rollout.server.name={name}", f"tracking.runs_dir={runs}", f"seed={seed}"]
                found[side].append(train(Path(runs), [*on_it, *settings, *options]))
                rows.append({"side": f"{side}, seed {seed}", **found[side][-1]})
    for side in list(SIDES)[1:]:
        pairs = list(zip(found[side], found["synchronous"], strict=True))
        gain = statistics.median(a["tokens/s"] / b["tokens/s"] for a, b in pairs)
        lost = max(b["pass@1"] - a["pass@1"] for a, b in pairs)
        bars += [
            bar(f"{side}: tokens/s against the synchronous loop", gain, f">= {GAIN}", gain >= GAIN),
            bar(f"{side}: final accuracy lost, worst seed", lost, f"<= {POINTS}", lost <= POINTS),
        ]
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return {"name": "ahead", "machine": machine, "rows": rows, "bars": bars}


def train(runs: Path, settings: list[str]) -> dict[str, float]:
    main = "from rlalign.cli import main; main()"
    name = f"run-{len(list(runs.iterdir()))}"
    arguments = ["train", str(CONFIG), f"name={name}", "rollout.engine=server", *settings]
    subprocess.run(
        [sys.executable, "-c", main, *arguments, "tracking.live=false"],
        check=True,
        timeout=TIMEOUT_S,
        stdout=sys.stderr,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    result = json.loads((runs / name / "result.json").read_text())
    steps = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    steps = steps[2:]  # the first ones warm up
    total_s = sum(step["time/total_s"] for step in steps)
    return {
        "tokens/s": sum(tokens(step) for step in steps) / total_s,
        "step, median s": statistics.median(step["time/total_s"] for step in steps),
        "idle share": sum(step.get("time/wait_s", step["time/rollout_s"]) for step in steps)
        / total_s,
        "lag, max": max(step["policy/lag_max"] for step in steps),
        "pass@1": result["eval"]["after"]["pass@1"],
    }


def tokens(step: dict[str, float]) -> float:
    """Drawn and trained on in a step."""
    return step["perf/rollout_tokens_per_s"] * step["time/rollout_s"]


def bar(what: str, value: float, wanted: str, holds: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": wanted, "holds": holds}
