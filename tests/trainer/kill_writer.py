"""Kills checkpoint writers at random moments: `python kill_writer.py FOLDER KILLS`.

Each writer is a forked child that goes on from the newest checkpoint, trains a step, saves, and
acknowledges the step through a pipe once `save` has returned. After every kill the newest
checkpoint must be whole, of its step, and not older than any acknowledged one. Prints what happened
as JSON.
"""

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from rlalign.config.schema import OptimConfig
from rlalign.trainer import checkpoint
from rlalign.trainer.engine import TorchEngine


def build() -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(nn.Linear(3, 2), OptimConfig())


def save_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def write_forever(folder: Path, pipe: int) -> None:
    engine = build()
    newest = checkpoint.latest(folder)
    step = checkpoint.load(newest, engine=engine)["step"] if newest is not None else 0
    while True:
        engine.backward(engine.forward(torch.ones(1, 3)).square().sum())
        engine.step(0.1)
        step += 1
        for _ in range(1 + step % 2):  # every other one twice: kills fall into replacements too
            checkpoint.save(
                folder, step, engine=engine, state={"step": step}, save_model=save_model, keep=2
            )
        os.write(pipe, step.to_bytes(8, "little"))


def kill_one(folder: Path, patience_s: float) -> int:
    """Start a writer, kill it `patience_s` after its first save; returns the last step it
    acknowledged."""
    reader, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_forever(folder, pipe)
        finally:
            os._exit(1)
    os.close(pipe)
    ready, _, _ = select.select([reader], [], [], 60.0)
    time.sleep(patience_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    received = os.read(reader, 2**16)
    os.close(reader)
    assert ready and received, "the writer saved nothing within 60 s"
    return int.from_bytes(received[-8:], "little")


def main(folder: Path, kills: int) -> dict[str, int]:
    rng = random.Random(0)
    acknowledged, leftovers = 0, 0
    for _ in range(kills):
        acknowledged = max(acknowledged, kill_one(folder, rng.uniform(0, 0.1)))
        leftovers += any(path.name.startswith(".") for path in folder.iterdir())
        found = checkpoint.find(folder)
        assert not found.torn, found.torn
        engine = build()
        step = checkpoint.load(found.complete[-1], engine=engine)["step"]  # verifies the digests
        assert step == engine.num_updates >= acknowledged, (step, acknowledged)
    return {"kills": kills, "leftovers": leftovers, "acknowledged": acknowledged}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
