"""What several test modules need: a run that is small enough to repeat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rlalign
from rlalign.config import Config
from rlalign.models.random import write_random_model

ROOT = Path(__file__).resolve().parent.parent


def write_prompts(path: Path, count: int = 12) -> Path:
    rows = [{"prompt": f"{i}+{i + 3}=?", "answer": str(2 * i + 3)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_settings(folder: Path) -> dict[str, Any]:
    """A run of seconds on a random model: letters a to f are worth 1, digits 0 to 4 half."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        write_random_model(model, "qwen2", hidden=32, layers=2, max_positions=64)
        write_prompts(folder / "train.jsonl")
    return {
        "name": "tiny",
        "algo": {"loss_type": "grpo", "num_generations": 4, "beta": 0.0},
        "model": {"path": str(model)},
        "task": {"train": str(folder / "train.jsonl"), "max_prompt_length": 16},
        "rollout": {"engine": "hf", "max_completion_length": 12},
        "rewards": {
            "functions": [
                {"name": "regex", "params": {"pattern": "[a-f]", "full": False}},
                {"name": "regex", "weight": 0.5, "params": {"pattern": "[0-4]", "full": False}},
            ]
        },
        "trainer": {
            "engine": "torch",
            "max_steps": 4,
            "prompts_per_step": 3,
            "num_threads": 1,
            "optim": {"learning_rate": 1e-2},
        },
        "tracking": {"runs_dir": str(folder / "runs"), "live": False},
    }


def tiny_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    return rlalign.load_config(tiny_settings(folder), overrides)
