"""Bad input ends with its cause, its fix and exit status 1, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import rlalign
from rlalign import cli
from rlalign.models.random import write_random_model
from rlalign.tracking.rundir import RunDir
from tests.support import ROOT, tiny_settings


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `rlalign ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["rlalign", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(tmp_path)))
    return path


def no_eos(folder: Path) -> str:
    write_random_model(folder / "no_eos")
    file = folder / "no_eos" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["eos_token"] = None
    file.write_text(json.dumps(settings))
    for name in ("generation_config.json", "special_tokens_map.json"):
        (folder / "no_eos" / name).unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(folder / "no_eos").eos_token is None
    return f"model.path={folder / 'no_eos'}"


def empty_data(folder: Path) -> str:
    (folder / "empty.jsonl").write_text("")
    return f"task.train={folder / 'empty.jsonl'}"


def raising_reward(folder: Path) -> str:
    (folder / "bad_reward.py").write_text(
        "def raises(prompts, completions, **columns):\n    raise KeyError('gold answer missing')\n"
        "def hangs(prompts, completions, **columns):\n    import time\n    time.sleep(600)\n"
    )
    return "rewards.functions=[{name: 'bad_reward:raises'}]"


CASES = {
    "unknown key": (lambda folder: "algo.epsilonn=1", ["algo.epsilonn", "algo.epsilon"]),
    "unknown algorithm": (lambda folder: "algo.loss_type=grop", ["grop", "'grpo'"]),
    "missing model folder": (lambda folder: "model.path=./nowhere", ["./nowhere"]),
    "tokenizer without EOS": (no_eos, ["end-of-sequence", "eos"]),
    "missing data file": (lambda folder: "task.train=nothing.jsonl", ["nothing.jsonl"]),
    "empty data set": (empty_data, ["empty.jsonl"]),
    "prompt over the limit": (
        lambda folder: "task.max_prompt_length=3",
        ["max_prompt_length", "3"],
    ),
    "context too short": (
        lambda folder: "rollout.max_completion_length=500",
        ["max_completion_length", "64 positions"],
    ),
    "unknown reward": (
        lambda folder: "rewards.functions=[{name: exact_mach}]",
        ["exact_mach", "exact_match"],
    ),
    "reward that cannot be imported": (
        lambda folder: "rewards.functions=[{name: 'no_such_module:reward'}]",
        ["no_such_module"],
    ),
    "reward without its column": (
        lambda folder: "rewards.functions=[{name: python_tests}]",
        ["tests", "answer"],
    ),
    "GPU kernels on a CPU machine": (
        lambda folder: "kernels.backend=triton",
        ["kernels.backend", "needs a GPU", "kernels.backend=auto"],
    ),
    "GPU config on a CPU machine": (
        lambda folder: "trainer.device=cuda",
        ["cuda", "no usable GPU"],
    ),
    "ZeRO without DeepSpeed": (lambda folder: "trainer.zero_stage=2", ["zero_stage", "deepspeed"]),
    "evaluation without a correctness": (
        lambda folder: f"task.eval={folder / 'train.jsonl'}",
        ["regex, regex", "accuracy: true"],
    ),
    "temperature beyond vLLM's": (
        lambda folder: "rollout={engine: vllm, temperature: 3}",
        ["rollout.temperature = 3", "0.01 to 2"],
    ),
    "sequences longer than vLLM's": (
        lambda folder: "rollout={engine: vllm, vllm: {max_model_len: 20}}",
        ["max_model_len = 20", "28"],
    ),
    "resume of nothing": (lambda folder: "--resume", ["there is no run"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_names_cause_and_fix_and_writes_nothing(
    case, config, tmp_path, capsys, monkeypatch
):
    make, parts = CASES[case]
    status, _, err = run(capsys, monkeypatch, "train", str(config), make(tmp_path))
    assert status == 1
    for part in parts:
        assert part in err, err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("reward", "parts"),
    [
        ("raises", ["gold answer missing"]),
        ("hangs", ["timeout", "rewards.timeout_s"]),
    ],
)
def test_a_failing_reward_stops_the_run_and_keeps_what_was_recorded(
    reward, parts, config, tmp_path, capsys, monkeypatch
):
    raising_reward(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)  # where a user's own module lies
    function = f"rewards.functions=[{{name: 'bad_reward:{reward}'}}]"
    status, _, err = run(capsys, monkeypatch, "train", str(config), function, "rewards.timeout_s=2")
    assert status == 1
    for part in parts:
        assert part in err, err
    [left] = (tmp_path / "runs").iterdir()
    assert (left / "config.yaml").exists() and not (left / "result.json").exists()


def test_dry_run_prints_what_the_run_would_use_and_writes_nothing(
    config, tmp_path, capsys, monkeypatch
):
    status, out, _ = run(
        capsys, monkeypatch, "train", str(config), "algo.loss_type=gspo", "--dry-run"
    )
    assert status == 0
    shown = yaml.safe_load(out)
    assert shown["algo"]["importance_sampling_level"] == "sequence"
    assert not (tmp_path / "runs").exists()


def test_dry_run_refuses_settings_that_contradict_each_other(config, capsys, monkeypatch):
    status, out, err = run(
        capsys, monkeypatch, "train", str(config), "trainer.zero_stage=2", "--dry-run"
    )
    assert status == 1 and not out
    assert "needs trainer.engine=deepspeed" in err


def test_an_interrupt_says_how_to_go_on(config, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlalign.api.train", interrupted)
    status, _, err = run(capsys, monkeypatch, "train", str(config))
    assert status == 130 and "--resume" in err and "Traceback" not in err


def test_eval_of_a_checkpoint_gives_the_figures_of_the_run_and_changes_no_config(
    config, tmp_path, capsys, monkeypatch
):
    settings = [
        f"task.eval={tmp_path / 'train.jsonl'}",
        "rewards.functions=[{name: regex, params: {pattern: '[a-f]', full: false}}]",
        "trainer.max_steps=2",
    ]
    result = rlalign.train(rlalign.load_config(config, settings), quiet=True)
    last = result.path / "checkpoints" / "step_2"
    status, out, err = run(
        capsys, monkeypatch, "eval", str(config), *settings, "--checkpoint", str(last)
    )
    assert status == 0, err
    assert f"pass@1     {result.summary['eval']['after']['pass@1']:.4f}" in out
    loaded = rlalign.load_config(config, settings)
    rlalign.evaluate(loaded, checkpoint=last)
    assert loaded.model.path == str(tmp_path / "model")


@pytest.mark.parametrize("command", ["report", "doctor"])
def test_a_run_without_steps_is_no_traceback(command, tmp_path, capsys, monkeypatch):
    RunDir(tmp_path / "run").create("name: run\n", {})
    status, out, err = run(capsys, monkeypatch, command, str(tmp_path / "run"))
    assert status == (0 if command == "report" else 1)
    assert "Traceback" not in err and (out or "no metrics" in err)


@pytest.mark.parametrize("name", ["mini", "single_gpu", "multi_gpu"])
def test_shipped_configs_resolve(name, capsys, monkeypatch):
    path = str(ROOT / "configs" / "grpo" / f"{name}.yaml")
    status, out, err = run(capsys, monkeypatch, "train", path, "--dry-run")
    assert status == 0, err
    assert yaml.safe_load(out)["algo"]["loss_type"] == "grpo"


def test_the_single_gpu_config_trains_a_shrunken_model_on_its_kind_of_data(
    tmp_path, capsys, monkeypatch
):
    """The same file, with a random miniature of the model and a CPU in place of the GPU."""
    write_random_model(tmp_path / "model", "qwen2", hidden=32, max_positions=256)
    rows = [{"prompt": f"Tom has {i} pens.", "answer": f"#### {i}"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = run(
        capsys,
        monkeypatch,
        "train",
        str(ROOT / "configs" / "grpo" / "single_gpu.yaml"),
        f"model.path={tmp_path / 'model'}",
        f"task.train={tmp_path / 'train.jsonl'}",
        f"task.eval={tmp_path / 'train.jsonl'}",
        f"tracking.runs_dir={tmp_path / 'runs'}",
        "task.max_prompt_length=120",
        "rollout.engine=hf",
        "rollout.max_completion_length=8",
        "rollout.logp_tolerance=1",
        "trainer.device=cpu",
        "trainer.prompts_per_step=2",
        "trainer.max_steps=1",
    )
    assert status == 0, err
    [left] = (tmp_path / "runs").iterdir()
    assert json.loads((left / "result.json").read_text())["steps"] == 1


@pytest.mark.parametrize("content", [None, "{}\n"])
def test_report_of_no_records_names_the_file_and_writes_nothing(
    content, tmp_path, capsys, monkeypatch
):
    if content is not None:
        (tmp_path / "out.jsonl").write_text(content)
    status, _, err = run(capsys, monkeypatch, "report", str(tmp_path / "out.jsonl"))
    assert status == 1 and "out.jsonl" in err and "Traceback" not in err
    assert not (tmp_path / "out.html").exists()


def test_decode_lists_its_methods(capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "decode", "--help")
    assert status == 0
    for method in ("best-of-n", "majority", "latent-seek", "rain", "logit-fusion", "reflect"):
        assert method in out


def test_every_command_has_help_with_an_example():
    for command in ("train", "eval", "verify", "algos", "report", "doctor", "bench"):
        shown = subprocess.run(
            [sys.executable, "-m", "rlalign.cli", command, "--help"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert shown.returncode == 0 and "Example" in shown.stdout, command
