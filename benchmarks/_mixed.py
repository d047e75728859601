"""A task of mixed difficulty: a model that can do some of `mini:chain`, and questions most of which
teach it nothing any more, a part that does, and some that nobody can answer.

    70 %  no step crosses a ten: solved                  the start is the warm-start model after
    20 %  two or more do: right about every third time   15 RAFT steps on such questions
    10 %  of that kind, with a wrong answer in the data: never right

Held-out accuracy is that on questions of the second kind."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import rlalign
from rlalign.tasks.chain import make_rows

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "grpo" / "mini.yaml"
QUIET = [
    "rollout.engine=hf",
    "trainer.engine=torch",
    "trainer.num_threads=1",
    "tracking.save_rollouts=false",
    "algo.epsilon_high=null",
    "trainer.optim.schedule=constant",
]
EASY, HARD, BROKEN = 1400, 400, 200  # questions to train on
START_STEPS = 15


@dataclass(frozen=True)
class Mixed:
    """Where the parts lie."""

    model: Path
    train: Path
    held_out: Path

    def settings(self) -> list[str]:
        return [
            f"model.path={self.model}",
            f"task.train={self.train}",
            f"task.eval={self.held_out}",
        ]


def make_mixed(folder: Path, seed: int) -> Mixed:
    rows = make_rows("train", size=20000, seed=seed)
    easy = [row for row in rows if crossings(row["prompt"]) == 0]
    hard = [row for row in rows if crossings(row["prompt"]) >= 2]
    held_out = [r for r in make_rows("eval", size=2000) if crossings(r["prompt"]) >= 2]
    rng = random.Random(seed)
    broken = hard[HARD : HARD + BROKEN]
    broken = [{**r, "answer": str((int(r["answer"]) + rng.randint(3, 40)) % 100)} for r in broken]
    mixed = easy[:EASY] + hard[:HARD] + broken
    rng.shuffle(mixed)
    write(folder / "mixed.jsonl", mixed)
    write(folder / "held_out.jsonl", held_out[:300])
    write(folder / "first.jsonl", easy[EASY : EASY + START_STEPS * 32])
    settings = ["name=start", f"seed={seed}", f"tracking.runs_dir={folder / 'runs'}", *QUIET]
    settings += ["algo.loss_type=raft", "algo.prompt_weighting=prompt", "task.eval=null"]
    settings += [f"task.train={folder / 'first.jsonl'}", f"trainer.max_steps={START_STEPS}"]
    result = rlalign.train(rlalign.load_config(CONFIG, settings), quiet=True)
    model = folder / "model"
    shutil.copytree(result.path / "checkpoints" / f"step_{START_STEPS}", model)
    return Mixed(model, folder / "mixed.jsonl", folder / "held_out.jsonl")


def crossings(prompt: str) -> int:
    """Steps of the chain whose result lies in another ten than where they start."""
    value, *terms = (int(number) for number in re.findall(r"[+-]?\d+", prompt))
    count = 0
    for term in terms:
        count += (value + term) // 10 != value // 10
        value += term
    return count


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
