"""Checkpoints: complete or not there, whatever happens while they are written."""

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rlalign.config.schema import OptimConfig
from rlalign.trainer import checkpoint
from rlalign.trainer.checkpoint import CheckpointError
from rlalign.trainer.engine import EngineStateError, TorchEngine
from rlalign.trainer.tensor_files import TensorFiles, TensorWriter

OPTIM = OptimConfig(learning_rate=0.1)


def build(seed: int = 0, width: int = 3) -> TorchEngine:
    torch.manual_seed(seed)
    return TorchEngine(nn.Linear(width, 2), OPTIM)


def train(engine: TorchEngine, steps: int = 1) -> None:
    for _ in range(steps):
        engine.backward(engine.forward(torch.ones(1, 3)).square().sum())
        engine.step(0.1)


def save_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def save(folder: Path, step: int, engine: TorchEngine | None = None, keep: int = 2, **state):
    return checkpoint.save(
        folder, step, engine=engine or build(), state=state, save_model=save_model, keep=keep
    )


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.find(folder).complete]


def test_engine_progress_and_random_states_come_back_bit_for_bit(tmp_path):
    engine = build()
    train(engine, 3)
    state = {"cursor": 17, "loss": 0.1, "names": ["a", "β"], "none": None}
    random.gauss(0, 1)  # leaves a second value behind
    path = save(tmp_path, 3, engine, **state)
    drawn = (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist())
    train(engine, 2)
    wanted = dict(engine.export_state())

    fresh = build(seed=9)
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.load(path, engine=fresh) == state
    again = (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist())
    assert again == drawn
    train(fresh, 2)
    found = dict(fresh.export_state())
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert fresh.num_updates == 5


def test_the_manifest_lists_every_file_and_nothing_is_left_under_hidden_names(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert {"config.json", "trainer/state.json"} < files
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_older_ones_go_only_when_a_newer_one_is_complete(tmp_path):
    for step in (2, 10, 9, 11):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == ["step_10", "step_11"]

    def breaks(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path, 12, engine=build(), state={}, save_model=breaks, keep=1)
    assert steps(tmp_path) == ["step_10", "step_11"]
    save(tmp_path, 12, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_12"]


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 4, note="first")
    path = save(tmp_path, 4, note="second")
    assert checkpoint.load(path, engine=build())["note"] == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["step_4"]


DAMAGES = {
    "missing file": lambda path: (path / "config.json").unlink(),
    "short file": lambda path: os.truncate(path / "trainer/state.json", 10),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "torn manifest": lambda path: os.truncate(path / "manifest.json", 40),
    "wrong manifest": lambda path: (path / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_torn_one_is_passed_over_reported_and_kept(tmp_path, caplog, damage):
    save(tmp_path, 1)
    torn = save(tmp_path, 2)
    damage(torn)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == tmp_path / "step_1"
    assert str(torn) in caplog.text
    [found] = checkpoint.find(tmp_path).torn
    assert found.path == torn and found.reason
    save(tmp_path, 3, keep=1)
    assert torn.exists(), "pruning leaves it alone"
    save(tmp_path, 2, keep=9)  # a resumed run reaches its step again
    assert steps(tmp_path) == ["step_2", "step_3"]
    assert (tmp_path / "step_2.torn").is_dir()


def test_a_changed_byte_is_found_before_anything_is_loaded(tmp_path):
    path = save(tmp_path, 1)
    file = next((path / "trainer").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checkpoint.latest(tmp_path) == path, "sizes alone do not tell"
    engine = build(seed=9)
    before = dict(engine.export_state())
    with pytest.raises(CheckpointError, match=file.name):
        checkpoint.load(path, engine=engine)
    after = dict(engine.export_state())
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(EngineStateError, match="weight"):
        checkpoint.load(path, engine=build(width=4))


def test_nothing_there(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    (tmp_path / "notes").mkdir()
    assert checkpoint.find(tmp_path) == checkpoint.Found((), ())


def test_a_replacement_killed_between_its_two_renames_loses_nothing(tmp_path):
    save(tmp_path, 4, note="first")
    (tmp_path / "step_4").rename(tmp_path / ".step_4.replaced")
    path = checkpoint.latest(tmp_path)
    assert path is not None and checkpoint.load(path, engine=build())["note"] == "first"
    save(tmp_path, 5, keep=9)
    assert steps(tmp_path) == ["step_4", "step_5"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_4", "step_5"]


def test_tensors_are_spread_over_files_and_read_one_at_a_time(tmp_path):
    tensors = {f"t{i}": torch.randn(10, i) for i in range(6)}
    writer = TensorWriter(tmp_path, file_bytes=200)
    for key, tensor in tensors.items():
        writer.add(key, tensor)
    index = writer.close()
    assert len(set(index.values())) == len(list(tmp_path.iterdir())) > 1
    files = TensorFiles(tmp_path, index)
    assert list(files) == list(tensors)
    assert all(torch.equal(files[key], tensor) for key, tensor in tensors.items())


def test_kill_9_at_any_moment_loses_no_acknowledged_checkpoint(tmp_path):
    """See kill_writer.py: 25 writers, each killed at a random moment."""
    script = Path(__file__).with_name("kill_writer.py")
    folder = tmp_path / "checkpoints"
    run = subprocess.run(
        [sys.executable, str(script), str(folder), "25"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["kills"] == 25
    assert report["leftovers"] > 0, "no kill fell into a write: the test proves nothing"
    assert report["acknowledged"] >= 25
    save(folder, 10**6, keep=1)
    assert [p.name for p in folder.iterdir()] == ["step_1000000"]
