"""Diffusion language models through the whole loop: any algorithm of log-probs by naming another
engine and model, resumed bit for bit, and on two processes as on one."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import rlalign
from rlalign.algos import AlgoWarning
from rlalign.config import Config, ConfigError
from rlalign.config.schema import ModelConfig
from rlalign.models.masked_load import load_masked_lm
from rlalign.models.masked_random import write_random_masked
from tests.support import ROOT

SMALL = [
    "task.eval=null",
    "trainer.max_steps=2",
    "trainer.prompts_per_step=4",
    "algo.num_generations=4",
    "tracking.live=false",
    "trainer.micro_batch_tokens=400",
]


def small_config(folder: Path, *overrides: str, source: str = "configs/bgpo/mini.yaml") -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlgoWarning)
        return rlalign.load_config(
            ROOT / source, [*SMALL, f"tracking.runs_dir={folder / 'runs'}", *overrides]
        )


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path) -> list[dict]:
    """The metrics without those that measure time and memory."""
    measured = ("time/", "perf/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows_of(run)]


def weights(run: Path, step: int):
    [file] = (run / "checkpoints" / f"step_{step}").glob("model*.safetensors")
    return load_file(file)


SWAPPED = {  # algorithm of exact log-probs: what else has to be said
    "grpo": (),
    "dr_grpo": (),
    "dapo": (),
    "gspo": (),
    "cispo": (),
    "rloo": ("algo.beta=0",),
    "reinforce_plus_plus": ("algo.beta=0",),
    "reinforce_plus_plus_baseline": (),
    "reinforce_rej": (),
    "copg": (),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_algorithms_of_log_probs_train_by_naming_engine_and_model(name, tmp_path):
    few = "algo.likelihood.num_mc_samples=4"
    config = small_config(tmp_path, f"algo.loss_type={name}", few, *SWAPPED[name])
    first, second = rows_of(rlalign.train(config, quiet=True).path)
    for row in (first, second):
        assert row["optim/grad_norm"] > 0 and row["sampling/check_logp_diff"] < 1e-4
        assert row["elbo/per_token"] < 0
        assert "sampling/logp_diff/mean" not in row  # estimates are none of the sampler's
    assert second["policy/version"] == 1


@pytest.mark.parametrize(
    "name", ["diffu_grpo", "wd1", "coupled_grpo", "spg", "tracerl", "espo", "vrpo"]
)
def test_baselines_train_for_several_iterations(name, tmp_path):
    iterations = () if name == "vrpo" else ("algo.num_iterations=2",)
    source = f"configs/{name}/mini.yaml"
    run = rlalign.train(small_config(tmp_path, *iterations, source=source), quiet=True).path
    for row in rows_of(run):
        assert row["optim/grad_norm"] > 0 and row["optim/skipped_steps"] == 0
        assert row["sampling/check_logp_diff"] < 1e-4
        if name == "tracerl":  # the trainer's log-probs of the sampler's choices are the sampler's
            assert row["sampling/logp_diff/mean"] < 1e-5
            assert row["sampling/logp_diff/max"] < 1e-4
        if name in ("diffu_grpo", "coupled_grpo", "tracerl", "espo"):
            assert row["kl"] > 0


def test_the_estimates_of_the_steps_figures_are_those_of_the_policy(tmp_path):
    """Slopes without values must not leave figures without values behind."""
    config = small_config(tmp_path, source="configs/tracerl/mini.yaml")
    for row in rows_of(rlalign.train(config, quiet=True).path):
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
        assert row["elbo/per_token"] < -0.01


def test_preferences_of_a_data_set_train_without_a_rollout(tmp_path):
    rows = [
        {"prompt": f"{i}21430", "completions": [f"012{i}34", "443210"], "scores": [1, 0]}
        for i in range(5)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    offline = [f"task.train={data}", "task.completions=dataset", "rewards.functions=[]"]
    # The data's completions end with an end token.
    offline += ["rollout.max_completion_length=7", "rollout.diffusion.eos_policy=drop"]
    config = small_config(tmp_path, *offline, source="configs/vrpo/mini.yaml")
    for row in rows_of(rlalign.train(config, quiet=True).path):
        assert row["optim/grad_norm"] > 0 and row["vrpo/accuracy"] in (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.slow
def test_bgpo_learns_to_sort(tmp_path):
    config = rlalign.load_config(
        ROOT / "configs/bgpo/mini.yaml",
        [f"tracking.runs_dir={tmp_path}", "tracking.live=false", "trainer.max_steps=30"],
    )
    held_out = rlalign.train(config, quiet=True).summary["eval"]
    gain = held_out["after"]["pass@1"] - held_out["before"]["pass@1"]
    assert held_out["before"]["pass@1"] < 0.75 and gain > 0.08


def test_a_mask_token_in_the_data_is_refused_with_its_row(tmp_path):
    row = {"prompt": "421430=", "completions": ["012<mask>34", "443210"], "scores": [1, 0]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    config = small_config(
        tmp_path,
        f"task.train={tmp_path / 'pairs.jsonl'}",
        "task.completions=dataset",
        "rewards.functions=[]",
        "rollout.max_completion_length=7",
        "rollout.diffusion.eos_policy=drop",
        source="configs/vrpo/mini.yaml",
    )
    with pytest.raises(ConfigError, match=r"pairs.*/0.* holds the mask token"):
        rlalign.train(config, quiet=True)


def test_groups_without_signal_move_no_weight_whatever_the_kl_to_the_old_policy(tmp_path):
    config = small_config(
        tmp_path,
        "rewards.functions=[{name: same}]",
        "trainer.optim.weight_decay=0.1",
        "trainer.max_steps=1",
        source="configs/tracerl/mini.yaml",
    )
    functions = {"same": lambda completions, **_: [1.0] * len(completions)}
    [row] = rows_of(rlalign.train(config, quiet=True, reward_functions=functions).path)
    assert row["optim/empty_steps"] == 1


@pytest.mark.slow
def test_a_checkpoint_of_another_project_survives_partitioned_training(tmp_path):
    path = write_random_masked(tmp_path / "llada", "llada")
    config = small_config(
        tmp_path,
        f"model.path={path}",
        "trainer.engine=deepspeed",
        "trainer.zero_stage=2",
        "trainer.max_steps=1",
    )
    result = rlalign.train(config, quiet=True)
    folder = result.path / "checkpoints" / "step_1"
    assert load_masked_lm(ModelConfig(path=str(folder))).mask_id == 262


SEVERAL = ["algo.num_iterations=2", "algo.num_minibatches=2", "trainer.max_steps=3"]


SLOW_ESPO = pytest.param("configs/espo/mini.yaml", marks=pytest.mark.slow)


@pytest.mark.parametrize("source", ["configs/bgpo/mini.yaml", SLOW_ESPO])
def test_a_resumed_run_ends_where_the_undisturbed_one_does(source, tmp_path):
    overrides = [*SEVERAL, "trainer.checkpoint_every=1", "trainer.keep_checkpoints=9"]
    whole = rlalign.train(small_config(tmp_path / "a", *overrides, source=source), quiet=True).path
    config = small_config(tmp_path / "b", *overrides, source=source)
    script = (
        "import sys, os, signal, rlalign.trainer.loop as loop\n"
        "from pathlib import Path\n"
        "from tests.trainer.test_masked_training import small_config\n"
        "import rlalign\n"
        "original, calls = loop.update, []\n"
        "def deadly(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*args)\n"
        "loop.update = deadly\n"
        "folder, source, *rest = sys.argv[1:]\n"
        "rlalign.train(small_config(Path(folder), *rest, source=source), quiet=True)\n"
    )
    arguments = [str(tmp_path / "b"), source, *overrides]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, timeout=120)
    assert killed.returncode == -9
    resumed = rlalign.train(config, resume=True, quiet=True).path
    assert figures(resumed) == figures(whole)
    mine, theirs = weights(resumed, 3), weights(whole, 3)
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    before = weights(whole, 1)
    assert any(not before[name].equal(theirs[name]) for name in theirs)


def launch(folder: Path, source: str, *overrides: str) -> Path:
    """The small job on two gloo processes; returns its run directory."""
    config = folder / "config.yaml"
    folder.mkdir()
    config.write_text(yaml.safe_dump({"extends": str(ROOT / source)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "rlalign.cli", "train", str(config), "trainer.engine=deepspeed", *SMALL]
    command += [f"tracking.runs_dir={folder / 'runs'}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    [run] = (folder / "runs").iterdir()
    return run


TWO = {
    "bgpo": (0, ("algo.num_iterations=2",)),
    "bgpo, split": (3, ()),
    "espo": (3, ("algo.num_iterations=2",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO)
def test_two_processes_take_the_steps_of_one(case, tmp_path):
    """One of them has one micro-batch less to run."""
    stage, overrides = TWO[case]
    source = f"configs/{case.partition(',')[0]}/mini.yaml"
    overrides = (*overrides, "trainer.micro_batch_tokens=100", "trainer.prompts_per_step=3")
    alone = rlalign.train(small_config(tmp_path / "one", *overrides, source=source), quiet=True)
    two = launch(tmp_path / "two", source, *overrides, f"trainer.zero_stage={stage}")
    for one, other in zip(rows_of(alone.path), rows_of(two), strict=True):
        timed = ("time/", "perf/", "memory/", "sampling/")
        names = [name for name in one if not name.startswith(timed)]
        assert {name: other[name] for name in names} == pytest.approx(
            {name: one[name] for name in names}, rel=1e-3, abs=1e-5
        )


def test_a_run_is_evaluated_and_drawn(tmp_path):
    config = small_config(tmp_path, "task.eval=mini:sort6", "trainer.eval_samples=1")
    result = rlalign.train(config, quiet=True)
    assert result.summary["eval"]["before"]["pass@1"] > 0.9  # one sample: greedy
    checkpoint = result.path / "checkpoints" / "step_2"
    command = [sys.executable, "-m", "rlalign.cli"]
    for arguments in (
        ["eval", str(ROOT / "configs/bgpo/mini.yaml"), "--checkpoint", str(checkpoint)],
        ["report", str(result.path)],
    ):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_says_when_each_token_was_decided(tmp_path):
    result = rlalign.train(small_config(tmp_path, "trainer.max_steps=1"), quiet=True)
    row = json.loads((result.path / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    assert sorted(row["steps"]) == [0, 0, 1, 1, 2, 2]
    assert rows_of(result.path)[0]["completions/tokens_per_step"] == 2
