"""Training on completions that are already there, with no engine running: CoPG on scored groups,
IPO as its special case on pairs, and TRL's DPOTrainer (DPO, IPO) on the same pairs.

The warm-start model of `mini:chain` answers 1024 questions eight times each; the exact match is the
score. From these completions alone each side trains for 128 optimizer steps (AdamW, linear), four
times through the data, and is then asked 500 held-out questions, greedy. CoPG sees the groups; the
others see disjoint pairs of a right and a wrong completion of one prompt. Beta and rate of a side
are the best of a grid on seed 0: see SIDES."""

from __future__ import annotations

import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import rlalign
from rlalign.trainer.build import open_job
from rlalign.trainer.collect import make_requests, roll_out
from rlalign.trainer.sources import sampling_params

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROMPTS, SAMPLES, STEPS, EPOCHS = 1024, 8, 128, 4
# Beta and rate. On seed 0, which starts at .48: pass@1 by beta at the best rate; at other rates
# with the best beta.
SIDES = {
    "CoPG, groups": (0.1, 1e-4),  # 0.06: .798, 0.1: .806;       3e-4: .764, 3e-5: .676
    "IPO as CoPG, pairs": (0.1, 1e-4),  # 0.1: .690, 0.3: .588;  3e-4: .648, 3e-5: .644
    "TRL DPO, pairs": (0.3, 3e-5),  # 0.1: .570, 0.3: .622, 1: .610;     1e-4: .506, 1e-5: .554
    "TRL IPO, pairs": (3.0, 3e-5),  # 0.3: .462, 1: .532, 3: .614;       1 at 1e-4: .468, 1e-5: .544
}
POINTS = 0.10  # the bar
TIMEOUT_S = 1200.0
QUIET = ["trainer.engine=torch", "trainer.num_threads=1", "tracking.save_rollouts=false"]


def run(quick: bool) -> dict[str, Any]:
    rows, gains = [], []
    sides = {side: SIDES[side] for side in (list(SIDES)[:1] if quick else SIDES)}
    for seed in (0,) if quick else (0, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            found = compare(Path(folder), seed, sides)
        rows += found
        accuracy = {row["side"]: row["pass@1"] for row in found}
        gains.append(accuracy["CoPG, groups"] - accuracy["start"])
    worst, median = min(gains), statistics.median(gains)
    bars = [
        bar("CoPG: points gained without an engine, worst seed", worst),
        bar("the same, median", median),
    ]
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return {"name": "offline", "machine": machine, "rows": rows, "bars": bars}


def compare(folder: Path, seed: int, sides: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    model, scored, pairs = prepare(folder, seed)
    rows = [{"side": "start", "seed": seed, "pass@1": accuracy(model, seed)}]
    for side, (beta, rate) in sides.items():
        began = time.perf_counter()
        if side.startswith("TRL"):
            trained = train_trl(folder, model, pairs, side, beta, rate, seed)
        else:
            data = scored if "groups" in side else pairs
            trained = train_ours(folder, model, data, beta, rate, seed)
        train_s = time.perf_counter() - began
        found = {"pass@1": accuracy(trained, seed), "beta": beta, "rate": rate, "train s": train_s}
        rows.append({"side": side, "seed": seed, **found})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def prepare(folder: Path, seed: int) -> tuple[Path, Path, Path]:
    """The warm-start model, its scored completions, and pairs of them."""
    settings = ["name=sample", f"seed={seed}", "rollout.engine=hf", f"tracking.runs_dir={folder}"]
    config = rlalign.load_config(CONFIGS / "grpo" / "mini.yaml", [*settings, *QUIET])
    rows = []
    with open_job(config) as job:
        prompts = job.train_prompts.take(0, PROMPTS)
        for first in range(0, PROMPTS, 64):
            part = prompts[first : first + 64]
            requests = make_requests(part, [SAMPLES] * len(part), seed, first, Counter())
            with job.sampling():
                params = sampling_params(job)
                drawn = roll_out(job.rollout, job.scorer, part, requests, params, job.world)
            for group, scores in zip(drawn.groups, drawn.scores, strict=True):
                rows.append(
                    {
                        "prompt": group.prompt.source,
                        "completions": [sample.text for sample in group.samples],
                        "scores": scores.reward_B.tolist(),
                        "truncated": [s.finish_reason == "length" for s in group.samples],
                    }
                )
        job.policy.save_pretrained(folder / "model")
        job.tokenizer.save_pretrained(folder / "model")
    write(folder / "scored.jsonl", rows)
    write(folder / "pairs.jsonl", make_pairs(rows, seed))
    return folder / "model", folder / "scored.jsonl", folder / "pairs.jsonl"


def make_pairs(rows: list[dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """Of each prompt as many disjoint pairs of a right and a wrong completion as there are; equal
    texts are one completion."""
    rng, pairs = random.Random(seed), []
    for row in rows:
        told = zip(row["completions"], row["scores"], row["truncated"], strict=True)
        whole = list({text: (text, score) for text, score, cut in told if not cut}.values())
        right = [text for text, score in whole if score == 1]
        wrong = [text for text, score in whole if score == 0]
        rng.shuffle(right)
        rng.shuffle(wrong)
        for chosen, rejected in zip(right, wrong, strict=False):
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def train_ours(folder: Path, model: Path, data: Path, beta: float, rate: float, seed: int) -> Path:
    count = sum(1 for _ in data.open())
    settings = [
        f"name=run-{len(list(folder.iterdir()))}",
        f"seed={seed}",
        f"tracking.runs_dir={folder / 'runs'}",
        f"model.path={model}",
        f"task.train={data}",
        f"algo.beta={beta}",
        f"trainer.prompts_per_step={count * EPOCHS // STEPS}",
        f"trainer.max_steps={STEPS}",
        f"trainer.optim.learning_rate={rate}",
        "trainer.optim.warmup_steps=0",
        *(["algo.copg.scale=pair"] if data.stem == "pairs" else []),
    ]
    config = rlalign.load_config(CONFIGS / "copg" / "offline.yaml", [*settings, *QUIET])
    result = rlalign.train(config, quiet=True)
    return result.path / "checkpoints" / f"step_{STEPS}"


def train_trl(
    folder: Path, model: Path, data: Path, side: str, beta: float, rate: float, seed: int
) -> Path:
    out = folder / side.replace(" ", "-").replace(",", "")
    count = sum(1 for _ in data.open())
    spec = {
        "model": str(model),
        "data": str(data),
        "out": str(out),
        "loss": {"TRL DPO, pairs": "sigmoid", "TRL IPO, pairs": "ipo"}[side],
        "beta": beta,
        "rate": rate,
        "steps": STEPS,
        "batch": count * EPOCHS // STEPS,
        "seed": seed,
    }
    script = Path(__file__).with_name("_offline_trl.py")
    subprocess.run([sys.executable, str(script), json.dumps(spec)], check=True, timeout=TIMEOUT_S)
    return out


def accuracy(model: Path, seed: int) -> float:
    """Greedy, on the held-out questions."""
    settings = ["name=eval", f"seed={seed}", "rollout.engine=hf", f"model.path={model}", *QUIET]
    config = rlalign.load_config(CONFIGS / "grpo" / "mini.yaml", settings)
    return float(rlalign.evaluate(config)["pass@1"])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bar(what: str, value: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": f">= {POINTS}", "holds": value >= POINTS}
