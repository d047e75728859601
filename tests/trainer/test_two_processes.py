"""The whole loop on two processes takes the steps that one process takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rlalign
from tests.support import ROOT, tiny_config, tiny_settings

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
