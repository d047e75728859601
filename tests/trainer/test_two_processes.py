"""The whole loop on two processes takes the steps that one process takes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rlalign
from rlalign.models.random import write_random_model
from tests.rollout.live_server import LiveServer
from tests.support import ROOT, tiny_config, tiny_settings
from tests.trainer.ranks import run_ranks

OVERRIDES = ["trainer.max_steps=3", "trainer.checkpoint_every=2"]


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def launch(folder: Path, *overrides: str) -> Path:
    """Train the tiny job on two gloo processes; returns its run directory."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "rlalign.cli", "train", str(config), "trainer.engine=deepspeed"]
    done = subprocess.run(
        [*command, *OVERRIDES, *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [run] = (folder / "runs").iterdir()
    return run


@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_take_the_steps_of_one(stage, tmp_path):
    alone = rlalign.train(tiny_config(tmp_path / "one", OVERRIDES), quiet=True)
    two = launch(tmp_path / "two", f"trainer.zero_stage={stage}")
    ones, twos = rows_of(alone.path), rows_of(two)
    assert len(ones) == len(twos) == 3
    for one, other in zip(ones, twos, strict=True):
        assert other["reward"] == pytest.approx(one["reward"], abs=1e-6)
        assert other["optim/grad_norm"] == pytest.approx(one["optim/grad_norm"], rel=1e-5)
        assert other["entropy"] == pytest.approx(one["entropy"], rel=1e-5)
    assert (two / "checkpoints" / "step_2" / "manifest.json").exists()
    one, other = (json.loads((run / "result.json").read_text()) for run in (alone.path, two))
    for count in ("generated_tokens", "train_tokens"):
        assert other[count] == one[count]


@pytest.mark.xdist_group("server")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_two_processes_share_a_lease_and_take_the_steps_of_one(tmp_path):
    shape = {"hidden": 64, "heads": 2, "kv_heads": 1, "layers": 2, "max_positions": 64}
    model = write_random_model(tmp_path / "model", "qwen2", **shape)
    server = LiveServer(model, tmp_path, "max_len=64")
    try:
        on_it = [
            f"model.path={model}", "rollout.engine=server",
            f"rollout.server.name={server.connection}",
        ]  # fmt: skip
        alone = rlalign.train(tiny_config(tmp_path / "one", [*OVERRIDES, *on_it]), quiet=True)
        two = launch(tmp_path / "two", "trainer.zero_stage=3", *on_it)
        for one, other in zip(rows_of(alone.path), rows_of(two), strict=True):
            assert other["reward"] == pytest.approx(one["reward"], abs=1e-6)
            assert other["optim/grad_norm"] == pytest.approx(one["optim/grad_norm"], rel=1e-4)
            assert other["policy/version"] == one["policy/version"]
            assert other["sampling/check_logp_diff"] < 1e-3
        assert server.state()["jobs"] == []
    finally:
        assert server.close() == 0


FAILURES = {  # what fails on which process only, and what every process says then
    "build": ("rlalign.trainer.build", "load_tokenizer", 1, "loading data and model"),
    "scoring": ("rlalign.trainer.collect", "split_scores", 1, "rollout"),
    "checkpoint": ("rlalign.trainer.checkpoint", "_seal", 0, "checkpoint of step 1"),
}


@pytest.mark.parametrize("place", FAILURES)
def test_a_failure_of_one_process_ends_all_with_its_words(place, tmp_path):
    """Started without torchrun, which would kill the others before they could say anything."""
    module, name, rank, said = FAILURES[place]
    settings = tiny_settings(tmp_path)
    settings["trainer"] |= {"engine": "deepspeed", "zero_stage": 1, "max_steps": 1}
    settings["trainer"]["exchange_timeout_s"] = 60.0
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    script = Path(__file__).with_name("failing_rank.py")
    outputs = run_ranks(script, str(config), module, name, str(rank))
    assert "no room on rank" in outputs[rank]
    other = outputs[1 - rank]
    assert f"DistributedError: {said} failed on rank {rank}: " in other
    assert "no room on rank" in other
    assert not list(tmp_path.glob("runs/*/checkpoints/step_*"))
