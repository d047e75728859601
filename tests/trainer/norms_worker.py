"""One of two processes under ZeRO-3 that share out the norms of one batch; started by
test_gradient_norms.py with the model's folder and one for the results."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rlalign.config.schema import TrainerConfig
from rlalign.trainer.deepspeed_engine import DeepSpeedEngine
from rlalign.trainer.distributed import joined_world
from rlalign.trainer.gradient_norms import norms_of_batch
from tests.trainer.test_gradient_norms import SETS, config, rows
from tests.trainer.test_policy import build


def main(model: str, folder: Path) -> None:
    with joined_world("cpu", timeout_s=60.0) as world:
        engine = DeepSpeedEngine(build(model), TrainerConfig(zero_stage=3), world=world)
        for name, batch, sets in (
            ("many", rows(), SETS),
            ("one", rows().rows([0, 3]), None),  # the other process has nothing to do
        ):
            limit = 40 if name == "many" else 10_000
            found = norms_of_batch(engine, batch, config(limit), world, "lm_head", sets)
            torch.save(tuple(found), folder / f"{name}-{world.rank}.pt")
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
