"""Our side of `train`: `rlalign.api.train` as a user runs it, in a process of its own.

python benchmarks/_train_rlalign.py SPEC.json MODEL_FOLDER RESULT.json ENGINE
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _train_spec import TrainSpec, matmul_flops_per_s, peak_rss_bytes

PARTS = ("rollout", "reward", "logp", "backward", "step", "sync")


def run_rlalign(spec: TrainSpec, model_folder: str, engine: str) -> dict[str, Any]:
    """The same figures as `run_trl`, with rollout engine `hf` or `vllm`."""
    import torch

    import rlalign

    torch.set_num_threads(spec.num_threads)
    rate_before = matmul_flops_per_s(spec.num_threads)
    cpu_s = _count_cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        result = rlalign.train(_config(spec, model_folder, engine, Path(folder)), quiet=True)
        steps = [json.loads(line) for line in (result.path / "metrics.jsonl").open()]
        rows = [_rows(path) for path in sorted((result.path / "rollouts").glob("*.jsonl"))]
    assert len(steps) == len(rows) == spec.warmup_steps + spec.steps
    timed, rows = steps[spec.warmup_steps :], rows[spec.warmup_steps :]
    return {
        "side": f"rlalign {engine}",
        "step_s": [step["time/total_s"] for step in timed],
        "cpu_s": cpu_s[spec.warmup_steps :],
        "tokens": [sum(row["num_tokens"] for row in step) for step in rows],
        "split_s": {part: [step[f"time/{part}_s"] for step in timed] for part in PARTS},
        "lengths": [row["num_tokens"] for step in rows for row in step],
        "peak_rss_bytes": peak_rss_bytes(),
        "matmul_flops_per_s": [rate_before, matmul_flops_per_s(spec.num_threads)],
    }


def _count_cpu_seconds() -> list[float]:
    """Filled with the CPU seconds of every training step to come."""
    from rlalign.trainer import loop

    seconds: list[float] = []
    train_step = loop.train_step

    def timed(*args: Any) -> Any:
        start = time.process_time()
        result = train_step(*args)
        seconds.append(time.process_time() - start)
        return result

    loop.train_step = timed
    return seconds


def _config(spec: TrainSpec, model_folder: str, engine: str, folder: Path) -> Any:
    import rlalign

    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in spec.prompts()))
    return rlalign.load_config(
        {
            "name": "bench-train",
            "seed": spec.seed,
            "algo": {"loss_type": "grpo", "num_generations": spec.group_size, "beta": 0.0},
            "model": {"path": model_folder},
            "task": {"train": str(data), "shuffle": False, "max_prompt_length": 32},
            "rollout": {"engine": engine, "max_completion_length": spec.max_completion_length},
            "rewards": {"functions": [{"name": "_train_reward:reward"}]},
            "trainer": {
                "engine": "torch",
                "device": "cpu",
                "max_steps": spec.warmup_steps + spec.steps,
                "prompts_per_step": spec.num_prompts,
                "num_threads": spec.num_threads,
                "optim": {"learning_rate": spec.learning_rate},
            },
            "tracking": {"runs_dir": str(folder / "runs"), "live": False},
        }
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


if __name__ == "__main__":
    spec_file, model, result_file = map(Path, sys.argv[1:4])
    figures = run_rlalign(TrainSpec.from_json(spec_file.read_text()), str(model), sys.argv[4])
    result_file.write_text(json.dumps(figures))
