"""One rollout server for four jobs: two one after the other, then two LoRA jobs at once.

    python examples/reuse_server.py

A minute or two on two cores. The engine starts once; every job trains as if it had its own, and
finds the model's own weights when it begins.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RLALIGN = [sys.executable, "-c", "from rlalign.cli import main; main()"]
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "grpo" / "mini.yaml"
STEPS = 10


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        connection = Path(folder) / "server.json"
        options = [f"name={connection}", "max_len=128", "num_threads=1", "vllm.max_loras=2"]
        server = subprocess.Popen([*RLALIGN, "serve", "mini:chain", *options])
        try:
            while not connection.exists():
                if server.poll() is not None:
                    sys.exit("the server did not start")
                time.sleep(0.2)
            for loss in ("grpo", "rloo"):
                show(start(loss, connection, folder, f"algo.loss_type={loss}"), folder, loss)
            # LoRA jobs share the server's model, so theirs is the same: model.path and seed.
            lora = ["model.lora.rank=8", "model.lora.alpha=16"]
            rates = {"lora-fast": "4e-3", "lora-slow": "1e-3"}
            jobs = {
                name: start(name, connection, folder, *lora, f"trainer.optim.learning_rate={rate}")
                for name, rate in rates.items()
            }
            for name, job in jobs.items():
                show(job, folder, name)
        finally:
            server.terminate()
            server.wait()


def start(name: str, connection: Path, folder: str, *more: str) -> subprocess.Popen:
    overrides = [
        f"name={name}", f"tracking.runs_dir={folder}", "tracking.live=false", "task.eval=null",
        "rollout.engine=server", f"rollout.server.name={connection}",
        f"trainer.max_steps={STEPS}", *more,
    ]  # fmt: skip
    return subprocess.Popen([*RLALIGN, "train", str(CONFIG), *overrides], stdout=subprocess.DEVNULL)


def show(job: subprocess.Popen, folder: str, name: str) -> None:
    if job.wait() != 0:
        sys.exit(f"{name} failed")
    lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    print(
        f"{name}: reward {first['reward']:.2f} -> {last['reward']:.2f} in {STEPS} steps, "
        f"engine and trainer differ by at most {last['sampling/logp_diff/max']:.1e} nats"
    )


if __name__ == "__main__":
    main()
