"""The whole loop on two processes takes the steps that one process takes."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

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


OFFLINE = ["algo.loss_type=rloo", "algo.beta=0.1", "rewards.functions=[]"]
OFFLINE += ["task.completions=dataset", "rollout.engine=none"]


@pytest.mark.parametrize(("stage", "lora"), [(0, 0), (3, 0), (3, 4)])
def test_two_processes_share_out_the_reference_of_a_data_set(stage, lora, tmp_path, monkeypatch):
    """Each its part of the rows, and both have all of them afterwards."""
    rows = [
        {"prompt": f"{i}+3=?", "completions": ["abc", f"{i}2", "ba"], "scores": [1, 0, i]}
        for i in range(5)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    runs, cached = {}, {}
    for name in ("one", "two"):
        monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / f"cache-{name}"))
        tiny_settings(tmp_path / name)
        (tmp_path / name / "train.jsonl").write_text(data)
        overrides = [*OVERRIDES, *OFFLINE, f"model.lora.rank={lora}"]
        if name == "one":
            runs[name] = rlalign.train(tiny_config(tmp_path / name, overrides), quiet=True).path
        else:
            runs[name] = launch(tmp_path / name, *overrides, f"trainer.zero_stage={stage}")
        [cached[name]] = (tmp_path / f"cache-{name}" / "reference").iterdir()
    assert cached["one"].name == cached["two"].name  # one digest, whatever the split of the weights
    one, two = (load_file(file) for file in cached.values())
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5)
    for first, second in zip(rows_of(runs["one"]), rows_of(runs["two"]), strict=True):
        for figure in ("reward", "kl", "optim/grad_norm"):
            assert second[figure] == pytest.approx(first[figure], rel=1e-4, abs=1e-7)


def test_two_processes_take_the_reference_from_the_cache(tmp_path, monkeypatch):
    """What they read is what they use: every log-prob there is made 0.1 too low."""
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / "cache"))
    data = json.dumps({"prompt": "1+3=?", "completions": ["abc", "12"], "scores": [1, 0]}) + "\n"
    for name in ("one", "two"):
        tiny_settings(tmp_path / name)
        (tmp_path / name / "train.jsonl").write_text(data)
    config = tiny_config(tmp_path / "one", [*OVERRIDES, *OFFLINE])
    assert rows_of(rlalign.train(config, quiet=True).path)[0]["kl"] == pytest.approx(0, abs=1e-6)
    [file] = (tmp_path / "cache" / "reference").iterdir()
    tensors = load_file(file)
    save_file(tensors | {"logp_N": tensors["logp_N"] - 0.1}, file)
    first, *_ = rows_of(launch(tmp_path / "two", *OFFLINE, "trainer.zero_stage=0"))
    assert first["kl"] == pytest.approx(math.exp(-0.1) - 1 + 0.1, rel=1e-3)  # k3


def test_two_processes_mix_samples_and_completions_as_one_does(tmp_path):
    mixed = ["algo.loss_type=rloo", "task.completions=mixed", "algo.beta=0.1"]
    runs = []
    for name in ("one", "two"):
        tiny_settings(tmp_path / name)
        (tmp_path / name / "train.jsonl").write_text(
            "".join(
                json.dumps({"prompt": f"{i}+3=?", "completions": ["abc", f"{i}2"], "weights": i})
                + "\n"
                for i in range(1, 5)
            )
        )
        if name == "one":
            config = tiny_config(tmp_path / name, [*OVERRIDES, *mixed])
            runs.append(rlalign.train(config, quiet=True).path)
        else:
            runs.append(launch(tmp_path / name, *mixed, "trainer.zero_stage=1"))
    samples = [
        [json.loads(line) for file in sorted((run / "rollouts").iterdir()) for line in file.open()]
        for run in runs
    ]
    for key in ("prompt_id", "completion", "source_id", "reward"):
        assert [row[key] for row in samples[0]] == [row[key] for row in samples[1]]
    assert {row["source_id"] for row in samples[0]} == {0, 1}
    for first, second in zip(*map(rows_of, runs), strict=True):
        assert second["optim/grad_norm"] == pytest.approx(first["optim/grad_norm"], rel=1e-4)


ALLOCATED = ["algo.loss_type=gvm_raft", "algo.allocation.acceptance_threshold=0"]
ALLOCATED += ["algo.allocation.num_pilot_samples=3", "algo.allocation.budget_per_prompt=4"]
ALLOCATED += ["algo.allocation.update_interval=2", "algo.allocation.grad_stat=exact"]
ALLOCATED += ["rollout.max_completion_length=40", "trainer.micro_batch_tokens=60"]
COPG = ["algo.loss_type=copg", "algo.beta=0.2", "trainer.micro_batch_tokens=20"]
COPG += OFFLINE[2:]
TWO_PASS = ["algo.copg.microbatch_mode=two_pass", "trainer.micro_batch_tokens=16"]
TREES = ["algo.loss_type=branch_grpo", "algo.tree.weight=omega_sum", "algo.num_minibatches=2"]
TREES += ["rollout.tree={num_trees: 2, segment_length: 3, max_leaves: 4}"]
TREES += ["trainer.micro_batch_tokens=60"]
CASES = {  # a process without a sample to draw, and one without a prompt in a micro-batch
    "allocated": (3, ALLOCATED),
    "copg": (0, COPG),
    "trees": (3, TREES),
    "copg in two passes": (2, [*COPG, *TWO_PASS, "algo.num_minibatches=2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_have_unequal_work_take_the_steps_of_one(case, tmp_path, monkeypatch):
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / "cache"))
    stage, overrides = CASES[case]
    for name in ("one", "two"):
        tiny_settings(tmp_path / name)
        if case.startswith("copg"):
            rows = [
                {"prompt": f"{i}+3=?", "completions": ["abc", f"{i}2", "ba"], "scores": [1, 0, i]}
                for i in range(5)
            ]
            data = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / name / "train.jsonl").write_text(data)
    alone = rlalign.train(tiny_config(tmp_path / "one", [*OVERRIDES, *overrides]), quiet=True)
    two = launch(tmp_path / "two", *overrides, f"trainer.zero_stage={stage}")
    for one, other in zip(rows_of(alone.path), rows_of(two), strict=True):
        timed = ("time/", "perf/", "memory/", "sampling/")
        names = [name for name in one if not name.startswith(timed)]
        assert {name: other[name] for name in names} == pytest.approx(
            {name: one[name] for name in names}, rel=1e-3, abs=1e-5
        )


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
