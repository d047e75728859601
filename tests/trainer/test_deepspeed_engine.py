"""DeepSpeedEngine in one process: every fact of the conformance list at every ZeRO stage, and one
state for all of them."""

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch

from rlalign.config.schema import TrainerConfig
from rlalign.trainer.deepspeed_engine import DeepSpeedEngine
from rlalign.trainer.engine import TorchEngine, TrainEngineError
from tests.trainer.engine_conformance import (
    CONFORMANCE,
    CONFORMANCE_BFLOAT16,
    OPTIM,
    Net,
    a_non_finite_gradient_changes_nothing,
    a_state_read_back_goes_on_bit_for_bit,
    assert_same,
    frozen_parameters_stay_and_unused_ones_have_a_zero_gradient,
    parameters_are_whole_and_the_forward_pass_works_in_between,
    same_updates_as_a_plain_torch_loop,
    snapshot,
    take_step,
)

PLACES = {
    "zero0": TrainerConfig(zero_stage=0),
    "zero1": TrainerConfig(zero_stage=1),
    "zero2": TrainerConfig(zero_stage=2),
    "zero3": TrainerConfig(zero_stage=3),
}
OFFLOADED = {
    "zero1-optimizer": TrainerConfig(zero_stage=1, offload_optimizer=True),
    "zero2-optimizer": TrainerConfig(zero_stage=2, offload_optimizer=True),
    "zero3-all": TrainerConfig(zero_stage=3, offload_optimizer=True, offload_param=True),
}
# What DeepSpeed does differently when the optimizer's tensors live elsewhere.
OFFLOAD_FACTS = [
    same_updates_as_a_plain_torch_loop,
    a_non_finite_gradient_changes_nothing,
    frozen_parameters_stay_and_unused_ones_have_a_zero_gradient,
    a_state_read_back_goes_on_bit_for_bit,
    parameters_are_whole_and_the_forward_pass_works_in_between,
]


@pytest.fixture
def build():
    """Makes engines and closes them at the end of the test."""
    with ExitStack() as stack:

        def make(module, optim, dtype=torch.float32, *, place=PLACES["zero0"]):
            config = TrainerConfig(**{**vars(place), "optim": optim})
            engine = DeepSpeedEngine(module, config, dtype=dtype)
            stack.callback(engine.close)
            return engine

        yield make


def at(build, place, dtype=torch.float32):
    return lambda module, optim, dtype=dtype: build(module, optim, dtype, place=place)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("fact", CONFORMANCE, ids=lambda fact: fact.__name__)
def test_float32(build, fact, place):
    fact(at(build, place))


@pytest.mark.parametrize("place", OFFLOADED.values(), ids=OFFLOADED.keys())
@pytest.mark.parametrize("fact", OFFLOAD_FACTS, ids=lambda fact: fact.__name__)
def test_float32_offloaded(build, fact, place):
    fact(at(build, place))


BFLOAT16_PLACES = {**PLACES, **OFFLOADED}


@pytest.mark.parametrize("place", BFLOAT16_PLACES.values(), ids=BFLOAT16_PLACES.keys())
@pytest.mark.parametrize("fact", CONFORMANCE_BFLOAT16, ids=lambda fact: fact.__name__)
def test_bfloat16(build, fact, place):
    fact(at(build, place, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_state_for_torch_and_every_stage(build, dtype):
    """A state handed from engine to engine, a step at each, is that of torch alone."""
    alone = TorchEngine(Net(), OPTIM, dtype=dtype)
    engines = [TorchEngine(Net(seed=1), OPTIM, dtype=dtype)]
    engines += [build(Net(seed=2), OPTIM, dtype, place=PLACES[f"zero{i}"]) for i in range(4)]
    engines += [build(Net(seed=3), OPTIM, dtype, place=OFFLOADED["zero3-all"])]
    state, count = snapshot(alone), 0
    for step, engine in enumerate(engines):
        engine.load_state(state, count)
        assert_same(snapshot(engine), state)
        take_step(engine, step)
        take_step(alone, step)
        state, count = snapshot(engine), engine.num_updates
    assert count == len(engines)
    for key, value in snapshot(alone).items():
        torch.testing.assert_close(state[key], value, atol=2e-6, rtol=1e-4, msg=key)


def test_bad_combinations_name_the_key():
    for config, key in (
        (TrainerConfig(zero_stage=2, offload_param=True), "trainer.zero_stage=3"),
        (TrainerConfig(zero_stage=0, offload_optimizer=True), "trainer.zero_stage >= 1"),
    ):
        with pytest.raises(TrainEngineError, match=key):
            DeepSpeedEngine(Net(), config)


def test_an_output_in_which_deepspeed_finds_no_tensors_is_an_error(build):
    @dataclass
    class Hidden:
        loss: torch.Tensor

    class Wrapped(Net):
        def forward(self, x):
            return Hidden(super().forward(x).prediction.sum())

    engine = build(Wrapped(), OPTIM, place=PLACES["zero2"])
    with pytest.raises(TrainEngineError, match="Hidden"):
        engine.forward(torch.ones(1, 5))
