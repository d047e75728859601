"""Training against TRL's GRPOTrainer on a CPU: same model, prompts, group size, lengths and number
of optimizer steps, one thread, one process each, all in one run and in turns.

Tokens per second are completion tokens over the whole step: rollout, reward, loss, backward,
optimizer, weight publishing. Both sides are warmed up: the first step of a process does not count.
On a busy machine, tokens per CPU second are the figure to look at; the rate of a float32 matrix
product, taken by every process, tells what the machine had to give.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _train_spec import TrainSpec, step_flops, summary, write_model

from rlalign.trainer.distributed import LAUNCHER_VARIABLES

HERE = Path(__file__).resolve().parent
SETTINGS = {
    "equal": TrainSpec(lengths="equal", max_completion_length=64),
    "natural": TrainSpec(lengths="natural", max_completion_length=128),
}
BARS = {"equal": 1.5, "natural": 2.5}  # times TRL's tokens per second
DEADLINE_S = 900  # one process


def run(quick: bool) -> dict[str, Any]:
    """The benchmark of `rlalign bench train`; `quick` takes one turn of each side in place of
    three, and leaves vLLM out."""
    engines = ["hf"] if quick or not importlib.util.find_spec("vllm") else ["hf", "vllm"]
    rows, bars = [], []
    for name, spec in SETTINGS.items():
        figures = _measure(spec, engines, turns=1 if quick else 3)
        table = {side: _row(name, spec, turns) for side, turns in figures.items()}
        rows += table.values()
        bars += _bars(name, table)
    return {"name": "train", "machine": _machine(), "rows": rows, "bars": bars}


def _measure(spec: TrainSpec, engines: list[str], turns: int) -> dict[str, list[dict[str, Any]]]:
    """The figures of every process by side; the sides take turns, so that a busy minute of the
    machine does not fall on one of them alone."""
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        model = write_model(spec, folder / "model")
        (folder / "spec.json").write_text(spec.to_json())
        for _ in range(turns):
            for script, *options in [
                ["_train_trl.py"],
                *(["_train_rlalign.py", e] for e in engines),
            ]:
                result = _process(folder, script, model, options)
                figures.setdefault(result["side"], []).append(result)
    return figures


def _process(folder: Path, script: str, model: Path, options: list[str]) -> dict[str, Any]:
    out = folder / "result.json"
    command = [sys.executable, HERE / script, folder / "spec.json", model, out, *options]
    # What a launcher (or DeepSpeed, in a process that used it) left would make the sides look for
    # peers.
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} {options} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def _row(name: str, spec: TrainSpec, turns: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [t / s for turn in turns for t, s in zip(turn["tokens"], turn["step_s"], strict=True)]
    lengths = sorted(length for turn in turns for length in turn["lengths"])
    step_s = statistics.median(s for turn in turns for s in turn["step_s"])
    peak = statistics.median(r for turn in turns for r in turn["matmul_flops_per_s"])
    prompt_tokens = statistics.mean(map(len, spec.prompts())) * spec.num_prompts
    tokens = statistics.mean(lengths) * spec.num_prompts * spec.group_size
    rate = summary(rates)
    return {
        "setting": name,
        "side": turns[0]["side"],
        "tokens/s": rate["median"],
        "spread": f"{rate['min']:.0f} to {rate['max']:.0f}",
        "tokens/CPU-s": statistics.median(
            t / s for turn in turns for t, s in zip(turn["tokens"], turn["cpu_s"], strict=True)
        ),
        "step s": step_s,
        "split s": _split(turns),
        "lengths": f"{lengths[0]} to {lengths[-1]}, mean {statistics.mean(lengths):.1f}",
        "peak MB": max(turn["peak_rss_bytes"] for turn in turns) / 1e6,
        "matmul GF/s": peak / 1e9,
        "of it used": step_flops(spec, prompt_tokens, tokens) / step_s / peak,
    }


def _split(turns: list[dict[str, Any]]) -> str:
    medians = {
        part: statistics.median(s for turn in turns for s in turn["split_s"][part])
        for part in turns[0]["split_s"]
    }
    return "\n".join(f"{part} {s:.3f}" for part, s in medians.items() if s >= 0.0005)


def _bars(name: str, table: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    peer = next(row for side, row in table.items() if side.startswith("trl"))
    ours = max(
        (row for side, row in table.items() if side.startswith("rlalign")),
        key=lambda row: row["tokens/s"],
    )
    speed, memory = ours["tokens/s"] / peer["tokens/s"], ours["peak MB"] / peer["peak MB"]
    return [
        {
            "what": f"{name} lengths: {ours['side']} against {peer['side']}, tokens/s",
            "value": speed,
            "bar": f">= {BARS[name]}",
            "holds": speed >= BARS[name],
        },
        {
            "what": f"{name} lengths: peak memory of {ours['side']} against {peer['side']}",
            "value": memory,
            "bar": "<= 1",
            "holds": memory <= 1,
        },
    ]


def _machine() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, 1 thread"
