"""Whole runs of a flow model: what they leave behind, resuming, several processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rlalign
from rlalign.models.flow_load import load_flow_model
from rlalign.models.mini_flow import MiniFlow
from rlalign.trainer.flow_job import open_flow_job, roll_out
from tests.support import ROOT

LABELS = ("dark", "light", "left", "right")


def settings(folder: Path) -> dict:
    """A tiny random flow model, four prompts, two rewards of pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = MiniFlow(LABELS, (1, 4, 4), width=16, blocks=1)
    for parameter in model.parameters():  # v = 0 otherwise
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "model")
    rows = [{"prompt": label, "answer": i} for i, label in enumerate(LABELS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "flow",
        "algo": {"loss_type": "branch_grpo"},
        "model": {"path": str(folder / "model")},
        "task": {key: str(folder / "prompts.jsonl") for key in ("train", "eval")},
        "rollout": {
            "engine": "flow",
            "flow": {"num_steps": 5, "split_steps": [0, 2], "eval_samples": 3},
        },
        "rewards": {"functions": [{"name": "symmetry"}, {"name": "ink", "weight": 0.5}]},
        "trainer": {
            "engine": "torch",
            "max_steps": 4,
            "prompts_per_step": 4,
            "checkpoint_every": 2,
            "num_threads": 1,
            "optim": {"learning_rate": 0.01},
        },
        "tracking": {"runs_dir": str(folder / "runs"), "live": False},
    }


def train(folder: Path, *overrides: str, resume: bool = False) -> Path:
    config = rlalign.load_config(settings(folder), list(overrides))
    return rlalign.train(config, quiet=True, resume=resume).path


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_its_model_and_its_trees(tmp_path):
    run = train(tmp_path, "trainer.max_steps=12")
    result = json.loads((run / "result.json").read_text())
    before, after = (result["eval"][when] for when in ("before", "after"))
    assert after["reward"] > before["reward"] + 0.05
    assert math.isclose(
        after["reward"], after["rewards/symmetry"] + 0.5 * after["rewards/ink"], rel_tol=1e-5
    )
    first = metrics_of(run)[0]
    assert first["tree/calls_per_leaf/rollout"] == (1 + 2 + 2 + 4 + 4) / 4
    assert first["tree/calls_per_leaf/train"] == (1 + 2 + 2 + 4) / 4  # not the last step
    assert result["generated_tokens"] == 12 * 4 * 13

    start = load_flow_model(str(tmp_path / "model"))
    final = load_flow_model(str(run / "checkpoints" / "step_12"))
    assert not all(map(torch.equal, start.state_dict().values(), final.state_dict().values()))

    lines = (run / "trees" / "step_000001.jsonl").read_text().splitlines()
    tree = json.loads(lines[0])
    images = tree["nodes"]["image"]
    assert len(images) == 1 + 2 + 2 + 4 + 4 + 4
    shown = [i for i, image in enumerate(images) if image]
    assert [tree["nodes"]["depth"][i] for i in shown] == [0, 1, 1, 3, 3, 3, 3, 5, 5, 5, 5]
    rows = (run / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    leaves = [r for r in map(json.loads, rows) if r["tree"] == 0]
    ends = [i for i, depth in enumerate(tree["nodes"]["depth"]) if depth == 5]
    for leaf, node in zip(leaves, ends, strict=True):
        assert leaf["reward"] == pytest.approx(tree["nodes"]["reward"][node])
        assert leaf["advantage"] == pytest.approx(tree["nodes"]["advantage"][node])
    assert "image" in Path(rlalign_report(run)).read_text()


def test_an_evaluation_has_the_figures_of_the_run(tmp_path):
    run = train(tmp_path)
    after = json.loads((run / "result.json").read_text())["eval"]["after"]
    config = rlalign.load_config(settings(tmp_path))
    found = rlalign.evaluate(config, checkpoint=run / "checkpoints" / "step_4")
    assert found == pytest.approx(after, rel=1e-6)


def rlalign_report(run: Path) -> Path:
    from rlalign.tracking.report import write_report

    return write_report(run)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path):
    whole = train(tmp_path / "whole", "rollout.flow.mix={window_size: 2, interval: 1}")
    part = train(
        tmp_path / "part",
        "rollout.flow.mix={window_size: 2, interval: 1}",
        "trainer.max_steps=2",
    )
    (part / "result.json").unlink()
    resumed = train(
        tmp_path / "part", "rollout.flow.mix={window_size: 2, interval: 1}", resume=True
    )
    assert resumed == part
    a, b = (load_flow_model(str(run / "checkpoints" / "step_4")) for run in (whole, part))
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    for figure in ("reward", "optim/grad_norm"):
        assert [m[figure] for m in metrics_of(whole)] == [m[figure] for m in metrics_of(part)]


@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_take_the_steps_of_one(stage, tmp_path):
    odd = ["trainer.prompts_per_step=3", "trainer.max_steps=2", "algo.beta=0.1"]
    alone = train(tmp_path / "one", *odd)
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path / "two")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "rlalign.cli", "train", str(config), "trainer.engine=deepspeed"]
    done = subprocess.run(
        [*command, f"trainer.zero_stage={stage}", *odd],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [two] = (tmp_path / "two" / "runs").iterdir()
    for one, other in zip(metrics_of(alone), metrics_of(two), strict=True):
        for figure in ("reward", "rewards/symmetry/mean", "optim/grad_norm", "tree/kept_edges"):
            assert other[figure] == pytest.approx(one[figure], rel=1e-4), figure
        assert other["tree/calls_per_leaf/train"] == one["tree/calls_per_leaf/train"]
    leaves = [(run / "rollouts" / "step_000001.jsonl").read_text() for run in (alone, two)]
    ones, others = ([json.loads(line) for line in text.splitlines()] for text in leaves)
    assert [row["prompt_id"].split("/")[-1] for row in ones] == [
        row["prompt_id"].split("/")[-1] for row in others
    ]
    assert [r["reward"] for r in others] == pytest.approx([r["reward"] for r in ones], rel=1e-5)
    results = [json.loads((run / "result.json").read_text()) for run in (alone, two)]
    for when in ("before", "after"):
        ones, others = (result["eval"][when] for result in results)
        assert others == pytest.approx(ones, rel=1e-3)


def test_a_failed_reward_leaves_its_leaf_out(tmp_path):
    """One image in three has no score: its siblings share its weight, and the run goes on."""

    def picky(completions, **_):
        return [None if i % 3 == 0 else float(x.mean()) for i, x in enumerate(completions)]

    config = rlalign.load_config(
        settings(tmp_path), ["rewards.functions=[{name: picky}]", "rewards.max_error_rate=1.0"]
    )
    with open_flow_job(config, reward_functions={"picky": picky}) as job:
        batch = roll_out(job, 0).batch
    leaves = batch.plan.shape.levels(4)[-1]
    assert batch.tree.reward_N[leaves].isnan().sum() == 6
    run = rlalign.train(config, quiet=True, reward_functions={"picky": picky}).path
    assert all(math.isfinite(m["optim/grad_norm"]) for m in metrics_of(run))
