"""Two processes against one: the same global batch gives the same gradient, at every ZeRO stage."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlalign.models.random import write_random_model
from rlalign.trainer import checkpoint
from rlalign.trainer.engine import TorchEngine
from tests.trainer.engine_conformance import (
    OPTIM,
    Net,
    assert_same,
    learning_rate,
    share,
    snapshot,
)
from tests.trainer.ranks import run_ranks
from tests.trainer.ranks_worker import (
    CASES,
    DTYPES,
    MINE,
    POLICIES,
    make_policy,
    policy_step,
    save_model,
)


def take_step(engine: TorchEngine, step: int) -> None:
    """All micro-batches of both ranks, in one process."""
    for parts in MINE.values():
        for i, rows in enumerate(parts):
            engine.backward(share(engine.forward, rows, step, use_spare=step == i == 0))
    engine.step(learning_rate(step))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One process saves after its first step; two processes go on from there."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, dtype in DTYPES.items():
        engine = TorchEngine(Net(), OPTIM, dtype=dtype)
        take_step(engine, 0)
        checkpoint.save(
            folder / "before" / name, 1, engine=engine, state={}, save_model=save_model, keep=1
        )
    for name in ("model", "untied"):  # wide enough for ZeRO-3 to split the head
        write_random_model(folder / name, "qwen2", hidden=512, layers=1, tied=name == "model")
    run_ranks(Path(__file__).with_name("ranks_worker.py"), str(folder))
    return folder


def report(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"rank{rank}.json").read_text())


def one_process(name: str, seed: int, steps: range, start: Path | None = None) -> TorchEngine:
    engine = TorchEngine(Net(seed), OPTIM, dtype=DTYPES[name.partition("-")[0]])
    if start is not None:
        checkpoint.load(start, engine=engine)
    for step in steps:
        take_step(engine, step)
    return engine


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("float32")])
def test_same_gradient_as_one_process(folder, name):
    expected = snapshot(one_process(name, 4, range(1)))
    found = load_file(folder / f"{name}.gradient.safetensors")
    for key, gradient in found.items():  # the first moment: the gradient times 1 - beta1
        error = (gradient - expected[key]).norm() / expected[key].norm()
        assert error <= 1e-5, (key, float(error))


@pytest.mark.parametrize("kind, stage", POLICIES)
def test_same_policy_gradient_as_one_process(folder, kind, stage):
    """The policy itself: packed forward, log-probs from hidden states, a tied head or adapters."""
    engine = TorchEngine(make_policy(kind, folder), OPTIM)
    expected = policy_step(engine, [slice(0, 8)])
    found = load_file(folder / f"policy-{kind}-zero{stage}.safetensors")
    assert all(gradient.any() for gradient in found.values())
    assert found.keys() == expected.keys()
    difference = sum(float((found[k] - expected[k]).square().sum()) for k in found)
    size = sum(float(expected[k].square().sum()) for k in found)
    assert difference**0.5 <= 1e-5 * size**0.5


@pytest.mark.parametrize("name", CASES)
def test_both_go_on_alike_from_one_checkpoint(folder, name):
    """One process wrote it, two trained on and wrote another, and one goes on from that."""
    precision = name.partition("-")[0]
    before = folder / "before" / precision / "step_1"
    alone = one_process(name, 4, range(1, 3), before)
    last = load_file(folder / f"{name}.last.safetensors")
    handed_back = one_process(name, 5, range(2, 3), folder / "after" / name / "step_2")
    tolerance = {"float32": 1e-6, "bfloat16": 1e-4}[precision]
    for state in (last, snapshot(handed_back)):
        for key, value in snapshot(alone).items():
            torch.testing.assert_close(state[key], value, atol=tolerance, rtol=1e-3, msg=key)
    weights = load_file(folder / f"{name}.weights.safetensors")
    for key in (key for key in weights if "frozen" not in key):
        assert torch.equal(weights[key], last[f"master/{key}"].to(DTYPES[precision]))
    for rank in (0, 1):
        case = report(folder, rank)[name]
        assert case["num_updates"] == 3 and case["resumed_alike"]


@pytest.mark.parametrize("name", CASES)
def test_a_nan_on_one_rank_is_skipped_on_all(folder, name):
    assert all(report(folder, rank)[name]["skipped"] for rank in (0, 1))
    precision = name.partition("-")[0]
    start = one_process(name, 6, range(0), folder / "before" / precision / "step_1")
    assert_same(load_file(folder / f"{name}.unchanged.safetensors"), snapshot(start))


def test_exchanges_between_processes(folder):
    payloads = [bytes(range(256)), bytes(range(5, 256)) * 4]
    for rank in (0, 1):
        found = report(folder, rank)["exchange"]
        assert [bytes.fromhex(part) for part in found["gathered"]] == payloads
        assert found["empty"] == [0, 0]
        assert bytes.fromhex(found["broadcast"]) == payloads[1]
        assert found["sum"] == [3.0, 1.0] and found["max"] == [0, 1]


def test_a_late_peer_is_an_error_that_names_the_wait(folder):
    message = report(folder)["exchange"]["late"]
    assert "group 17" in message and "deadline 0.2 s" in message and "rank 0 of 2" in message


LEAVE = """
import os
import sys
import torch
from rlalign.trainer.distributed import joined_world

with joined_world("cpu", timeout_s=60.0) as world:
    double = torch.library.custom_op("left::double", lambda x: 2 * x, mutates_args=(),
                                     schema="(Tensor x) -> Tensor")
    assert world.all_reduce_sum(double(torch.ones(2)), "sum").tolist() == [4.0, 4.0]
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
sys.exit(any("gloo" in name for name in names) and f"threads left: {names}")
"""


def test_a_process_that_leaves_has_no_thread_of_the_group_left(tmp_path):
    """One that stays races with the end of the interpreter, and may abort a run that succeeded."""
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    run_ranks(script, timeout_s=120.0)
