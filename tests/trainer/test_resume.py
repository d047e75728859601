"""A run that is killed with SIGKILL at any stage and resumed ends where the undisturbed run ends,
bit for bit, and loses no more than the steps since its last checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import rlalign
from rlalign.tracking.rundir import RunDirError
from tests.support import ROOT, tiny_config

OVERRIDES = ["trainer.max_steps=5", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9"]

# Runs the tiny job in a process of its own and kills it at the second call after `patience` calls
# of the named function, when the work is done and its result not yet used.
KILLED = """
import importlib, os, signal, sys
import rlalign
from rlalign.tracking.rundir import RunDirError
from tests.support import tiny_config
folder, module, owner, name, patience, *overrides = sys.argv[1:]
place = importlib.import_module(module)
if owner: place = getattr(place, owner)
original, calls = getattr(place, name), 0
def deadly(*args, **kwargs):
    global calls
    calls += 1
    result = original(*args, **kwargs)
    if calls > int(patience):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(place, name, deadly)
from pathlib import Path
rlalign.train(tiny_config(Path(folder), overrides), quiet=True)
"""

STAGES = {
    "rollout": ("rlalign.rollout.hf", "", "decode", 3),
    "optimizer step": ("torch.optim", "AdamW", "step", 3),
    "checkpoint": ("safetensors.torch", "", "save_file", 1),
}


def figures(run: Path) -> list[dict]:
    """The metrics without those that measure time and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = ("time/", "perf/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def samples(run: Path) -> list[str]:
    folders = (run / "rollouts", run / "trees")
    return [file.read_text() for folder in folders for file in sorted(folder.glob("*"))]


def weights(run: Path):
    [file] = (run / "checkpoints" / "step_5").glob("model*.safetensors")
    return load_file(file)


def assert_same_run(one: Path, other: Path) -> None:
    assert figures(one) == figures(other)
    assert samples(one) == samples(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].equal(theirs[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return rlalign.train(tiny_config(folder, OVERRIDES), quiet=True).path


def test_the_run_trains_at_all(undisturbed):
    """Otherwise equality below would mean nothing."""
    rows = figures(undisturbed)
    assert all(row["optim/grad_norm"] > 0 for row in rows)
    first, last = (undisturbed / "checkpoints" / f"step_{n}" for n in (2, 4))
    [a], [b] = first.glob("model*.safetensors"), last.glob("model*.safetensors")
    assert any(not load_file(a)[name].equal(load_file(b)[name]) for name in load_file(a))


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_equals_undisturbed(stage, undisturbed, tmp_path):
    module, owner, name, patience = STAGES[stage]
    arguments = [str(tmp_path), module, owner, name, str(patience), *OVERRIDES]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, timeout=240
    )
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    [run] = (tmp_path / "runs").iterdir()
    assert not (run / "result.json").exists()
    resumed = rlalign.train(tiny_config(tmp_path, OVERRIDES), resume=True, quiet=True)
    assert resumed.path == run
    assert_same_run(run, undisturbed)


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    before = (undisturbed / "metrics.jsonl").read_text()
    config = tiny_config(undisturbed.parent.parent, OVERRIDES)
    result = rlalign.train(config, resume=True, quiet=True)
    assert result.summary["steps"] == 5
    assert (undisturbed / "metrics.jsonl").read_text() == before


def test_another_engine_goes_on_from_the_same_checkpoint(undisturbed, tmp_path):
    """The checkpoint belongs to no engine: DeepSpeed continues what torch began."""
    rlalign.train(tiny_config(tmp_path, [*OVERRIDES, "trainer.max_steps=2"]), quiet=True)
    overrides = [*OVERRIDES, "trainer.engine=deepspeed", "trainer.zero_stage=1"]
    result = rlalign.train(tiny_config(tmp_path, overrides), resume=True, quiet=True)
    ours, theirs = figures(result.path), figures(undisturbed)
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["reward"] == pytest.approx(other["reward"], abs=1e-5)
        assert mine["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=1e-3)


RIGHT = "rewards.functions=[{name: regex, params: {pattern: '[a-f]', full: false}}]"
VARIANTS = {
    "dynamic sampling": [
        "algo.filter_groups.enable=true",
        "algo.filter_groups.metric=reward",
        "algo.filter_groups.max_num_gen_batches=20",
    ],
    "several optimizer steps": ["algo.num_minibatches=2", "algo.num_iterations=2"],
    "LoRA, KL in the reward": ["model.lora.rank=4", "algo.beta=0.1", "algo.kl_in=reward"],
    "evaluation": ["trainer.eval_every=2", "trainer.eval_samples=2", "task.eval=DATA", RIGHT],
    "epochs within a step": ["trainer.prompts_per_step=20"],
    "trees of tokens": [
        "algo.loss_type=branch_grpo",
        "algo.tree.depth_prune={size: 1, start: 1, interval: 2, stop: 2}",
        "rollout.tree={num_trees: 2, segment_length: 3, max_leaves: 4, fallback: true}",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_made_longer_equals_one_that_was_meant_so(variant, tmp_path):
    """It ends after 3 steps, and goes on to 5 from its last checkpoint."""
    data = str(tmp_path / "train.jsonl")
    overrides = [item.replace("DATA", data) for item in (*OVERRIDES, *VARIANTS[variant])]
    whole = rlalign.train(tiny_config(tmp_path, [*overrides, "name=whole"]), quiet=True)
    rlalign.train(tiny_config(tmp_path, [*overrides, "trainer.max_steps=3"]), quiet=True)
    longer = rlalign.train(tiny_config(tmp_path, overrides), resume=True, quiet=True)
    assert_same_run(longer.path, whole.path)
    assert longer.summary["eval"] == whole.summary["eval"]
    assert json.loads((longer.path / "result.json").read_text())["steps"] == 5
    assert "max_steps: 5" in (longer.path / "config.yaml").read_text()


@pytest.mark.parametrize("change", ["seed", "training data"])
def test_another_seed_or_other_data_is_another_run(change, undisturbed, tmp_path):
    folder = undisturbed.parent.parent
    config = tiny_config(folder, OVERRIDES)
    if change == "seed":
        config.seed = 7
    else:
        (tmp_path / "other.jsonl").write_text('{"prompt": "1+1=?"}\n')
        config.task.train = str(tmp_path / "other.jsonl")
    before = (undisturbed / "result.json").read_text()
    with pytest.raises(RunDirError, match=f"began with {change}"):
        rlalign.train(config, resume=True, quiet=True)
    assert (undisturbed / "result.json").read_text() == before
