"""TorchEngine, the schedule, and what is particular to one process."""

import math

import pytest
import torch
from torch import nn

from rlalign.config.schema import OptimConfig
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TorchEngine, TrainEngineError
from rlalign.trainer.schedule import lr_schedule
from tests.trainer.engine_conformance import (
    CONFORMANCE,
    CONFORMANCE_BFLOAT16,
    OPTIM,
    Net,
    snapshot,
    take_step,
)


def make(module, optim, dtype=torch.float32):
    return TorchEngine(module, optim, dtype=dtype)


@pytest.mark.parametrize("fact", CONFORMANCE, ids=lambda fact: fact.__name__)
def test_float32(fact):
    fact(make)


@pytest.mark.parametrize("fact", CONFORMANCE_BFLOAT16, ids=lambda fact: fact.__name__)
def test_bfloat16(fact):
    fact(lambda module, optim, dtype=torch.bfloat16: make(module, optim, dtype))


def test_several_processes_and_nothing_to_train_are_errors_with_the_fix():
    with pytest.raises(TrainEngineError, match=r"trainer\.engine=deepspeed"):
        TorchEngine(Net(), OPTIM, world=World(rank=0, size=2))
    with pytest.raises(TrainEngineError, match="nothing to train"):
        TorchEngine(nn.Linear(2, 2).requires_grad_(False), OPTIM)


def test_exported_tensors_are_copies():
    engine = TorchEngine(Net(), OPTIM)
    before = snapshot(engine)
    values = {key: value.clone() for key, value in before.items()}
    take_step(engine)
    assert all(torch.equal(before[key], values[key]) for key in before)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_warms_up_and_decays_monotonically(schedule):
    optim = OptimConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4)
    rates = [lr_schedule(step, optim, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0 or schedule == "constant"


def test_schedule_at_its_middle_and_past_its_end():
    def at(step, schedule):
        return lr_schedule(step, OptimConfig(learning_rate=1.0, schedule=schedule), 10)

    assert at(5, "linear") == pytest.approx(0.5) and at(5, "cosine") == pytest.approx(0.5)
    assert at(2, "cosine") == pytest.approx((1 + math.cos(0.2 * math.pi)) / 2)
    assert at(10, "linear") == at(99, "linear") == at(99, "cosine") == 0.0
    assert at(99, "constant") == 1.0


def test_schedule_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="polynomial"):
        lr_schedule(3, OptimConfig(schedule="polynomial"), 10)
    with pytest.raises(ValueError, match="-1"):
        lr_schedule(-1, OptimConfig(), 10)
