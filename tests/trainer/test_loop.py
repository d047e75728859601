"""The whole loop on a small random model: engine and trainer agree at every step, the reward rises,
and what each preset needs is there."""

import importlib.util
import json

import pytest
import torch

import rlalign
from rlalign import algos
from rlalign.config import ConfigError
from rlalign.models.errors import ModelError
from rlalign.models.random import write_random_model
from rlalign.rewards import RewardError
from rlalign.rollout.hf import HFEngine
from rlalign.trainer import build
from rlalign.trainer.engine import GuardedAdamW
from rlalign.trainer.job import Progress
from rlalign.trainer.loop import TrainingStopped, count_skipped
from rlalign.trainer.publish import WeightSyncError
from rlalign.trainer.update import UpdateResult
from tests.support import ROOT, tiny_config

VLLM = pytest.param(
    "vllm",
    marks=[
        pytest.mark.xdist_group("vllm"),
        pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vllm"),
    ],
)


def rows_of(result) -> list[dict]:
    return [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]


def test_reward_rises_and_log_probs_agree_at_every_step(tmp_path):
    overrides = [
        "trainer.max_steps=12",
        "trainer.prompts_per_step=8",
        "algo.num_generations=8",
    ]
    rows = rows_of(rlalign.train(tiny_config(tmp_path, overrides), quiet=True))
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1
    updated = [row for row in rows if not row["optim/empty_steps"]]
    assert len(updated) >= 8
    for row in updated:
        assert row["sampling/logp_diff/max"] <= 1e-4
        assert row["sampling/check_logp_diff"] <= 1e-4


OF_DIFFUSION = {n for n in algos.names() if algos.get(n).likelihood}  # test_masked_training.py
OF_FLOWS = {"dance_grpo", "flow_grpo", "mix_grpo"}  # presets for flow models
TREES = "rollout.tree={num_trees: 2, segment_length: 3, max_leaves: 4}"


@pytest.mark.parametrize("name", sorted(set(algos.names()) - OF_FLOWS - OF_DIFFUSION))
def test_every_preset_takes_steps(name, tmp_path):
    overrides = [f"algo.loss_type={name}", "algo.beta=null", "trainer.max_steps=2"]
    # RAFT accepts what is best (nothing is right), unless it is truncated.
    overrides += ["algo.allocation.accept=top_k", "rollout.max_completion_length=48"]
    overrides += [TREES] if dict(algos.expansion(name))["adv_estimator"] == "tree" else []
    rows = rows_of(rlalign.train(tiny_config(tmp_path, overrides), quiet=True))
    assert all(row["optim/grad_norm"] > 0 for row in rows)
    assert [row["policy/version"] for row in rows] == [0, 1]


@pytest.mark.parametrize("name", algos.names())
def test_every_preset_has_a_mini_config_that_resolves(name):
    config = rlalign.load_config(ROOT / "configs" / name / "mini.yaml")
    assert config.algo.loss_type == name
    preset = dict(algos.expansion(name))
    if name != "grpo":  # whose mini config overrides the preset on purpose
        assert config.algo.epsilon_high == preset["epsilon_high"]
        assert config.algo.beta == preset["beta"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo.num_minibatches=2", "algo.num_iterations=2"],
        ["model.lora.rank=4", "algo.beta=0.1"],
        ["model.gradient_checkpointing=true"],
        ["trainer.packing=false"],
        ["trainer.micro_batch_tokens=40"],
        ["algo.entropy_coef=0.01"],
        ["algo.mismatch.rollout_is=token", "algo.mismatch.rollout_is_batch_normalize=true"],
        ["algo.mismatch.bypass_mode=true"],
        ["model.dtype=bfloat16", "rollout.logp_tolerance=1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_settings_that_change_the_path_through_the_trainer(overrides, tmp_path):
    overrides = ["trainer.max_steps=2", *overrides]
    rows = rows_of(rlalign.train(tiny_config(tmp_path, overrides), quiet=True))
    assert all(row["optim/grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("engine", ["hf", VLLM])
def test_an_adapter_on_the_head_trains_and_is_sampled_from(engine, tmp_path):
    """On the head alone: what the KL to the reference measures is that adapter and nothing else."""
    model = write_random_model(
        tmp_path / "untied", "qwen2", hidden=64, heads=2, kv_heads=1, max_positions=64, tied=False
    )
    overrides = [
        f"model.path={model}",
        f"rollout.engine={engine}",
        "model.lora={rank: 4, target_modules: lm_head}",
        "algo.beta=0.1",
        "trainer.optim.learning_rate=0.1",
        "rollout.logp_tolerance=1e-4",
    ]
    rows = rows_of(rlalign.train(tiny_config(tmp_path, overrides), quiet=True))
    assert all(row["optim/grad_norm"] > 0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 0.01
    assert all(row["sampling/logp_diff/max"] <= 1e-4 for row in rows)


def test_an_adapter_on_a_tied_head_is_refused_before_anything_is_written(tmp_path):
    overrides = ["model.lora.rank=4", "model.lora.target_modules=lm_head"]
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        rlalign.train(tiny_config(tmp_path, overrides), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_dynamic_sampling_keeps_only_groups_that_differ(tmp_path):
    overrides = [
        "algo.filter_groups.enable=true",
        "algo.filter_groups.metric=reward",
        "algo.filter_groups.max_num_gen_batches=20",
        "trainer.max_steps=2",
    ]
    rows = rows_of(rlalign.train(tiny_config(tmp_path, overrides), quiet=True))
    for row in rows:
        assert row["sampling/groups_used"] == 3
        assert row["frac_reward_zero_std"] == 0


def test_dynamic_sampling_without_any_signal_stops_with_the_reason(tmp_path):
    overrides = [
        "algo.filter_groups.enable=true",
        "algo.filter_groups.max_num_gen_batches=2",
        "rewards.functions=[{name: regex, params: {pattern: 'never ever'}, accuracy: true}]",
    ]
    with pytest.raises(algos.SamplingExhausted, match="too hard"):
        rlalign.train(tiny_config(tmp_path, overrides), quiet=True)


def test_groups_that_agree_take_no_optimizer_step(tmp_path):
    overrides = [
        "rewards.functions=[{name: regex, params: {pattern: 'never ever'}, accuracy: true}]",
        "trainer.max_steps=2",
    ]
    rows = rows_of(rlalign.train(tiny_config(tmp_path, overrides), quiet=True))
    assert [row["optim/empty_steps"] for row in rows] == [1, 1]
    assert [row["policy/version"] for row in rows] == [0, 0]


def test_an_engine_that_ignores_its_update_ends_the_run(tmp_path, monkeypatch):
    """The fault this field is known for: the update is acknowledged, and the old weights sample."""
    original = HFEngine.score

    def stale(self, sequences, temperature=1.0):
        logp = original(self, sequences, temperature)
        return [x + 0.3 for x in logp] if self.version.version >= 2 else logp

    monkeypatch.setattr(HFEngine, "score", stale)
    with pytest.raises(WeightSyncError, match="version 2"):
        rlalign.train(tiny_config(tmp_path), quiet=True)


def test_a_reward_that_raises_stops_the_run_with_its_own_words(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text(
        "def reward(prompts, completions, **columns):\n    raise KeyError('no such gold answer')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = ["rewards.functions=[{name: 'broken_reward:reward'}]"]
    with pytest.raises(RewardError, match="no such gold answer"):
        rlalign.train(tiny_config(tmp_path, overrides), quiet=True)


def test_no_signal_at_all_is_a_step_without_samples_where_the_user_says_so(tmp_path):
    overrides = [
        "algo.filter_groups.enable=true",
        "algo.filter_groups.max_num_gen_batches=2",
        "algo.filter_groups.on_exhausted=train",
        "rewards.functions=[{name: regex, params: {pattern: 'never ever'}, accuracy: true}]",
        "trainer.max_steps=1",
    ]
    [row] = rows_of(rlalign.train(tiny_config(tmp_path, overrides), quiet=True))
    assert row["reward"] is None and row["optim/empty_steps"] == 1
    assert row["sampling/groups_generated"] == 6


def half_broken(prompts, completions, **columns):
    """Every other verdict is no number: an error of kind `invalid`."""
    return ["?" if i % 2 else 0.0 for i in range(len(completions))]


def test_failed_verdicts_of_groups_that_are_not_kept_are_counted_too(tmp_path):
    overrides = [
        "algo.filter_groups.enable=true",
        "algo.filter_groups.max_num_gen_batches=2",
        "algo.filter_groups.on_exhausted=train",
        "rewards.functions=[{name: broken}]",
        "rewards.max_error_rate=1",
        "trainer.max_steps=1",
    ]
    config = tiny_config(tmp_path, overrides)
    functions = {"broken": half_broken}
    [row] = rows_of(rlalign.train(config, quiet=True, reward_functions=functions))
    assert row["rewards/errors/invalid"] == 2 * 3 * 4 / 2  # rollouts, prompts, samples


def test_a_python_callable_is_a_reward(tmp_path):
    config = tiny_config(tmp_path, ["rewards.functions=[{name: letters}]", "trainer.max_steps=1"])

    def letters(completions, **columns):
        return [sum(char in "abc" for char in text) for text in completions]

    result = rlalign.train(config, quiet=True, reward_functions={"letters": letters})
    rows = (result.path / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        assert row["reward"] == letters([row["completion"]])[0]


def test_a_callable_that_no_reward_names_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'letters', which rewards\.functions does not name"):
        rlalign.train(tiny_config(tmp_path), quiet=True, reward_functions={"letters": len})
    assert not (tmp_path / "runs").exists()


def test_the_seed_keys_the_order_of_the_prompts(tmp_path):
    orders = []
    for seed in (0, 1):
        overrides = [f"seed={seed}", f"name=seed{seed}", "trainer.max_steps=1"]
        result = rlalign.train(tiny_config(tmp_path, overrides), quiet=True)
        rows = (result.path / "rollouts" / "step_000001.jsonl").read_text().splitlines()
        orders.append([json.loads(row)["prompt_id"] for row in rows])
    assert orders[0] != orders[1]


def test_prompts_of_one_token_and_steps_larger_than_the_data_train(tmp_path):
    tiny_config(tmp_path)
    rows = [{"prompt": digit} for digit in "12"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["trainer.prompts_per_step=5", "trainer.max_steps=2"]
    result = rlalign.train(tiny_config(tmp_path, overrides), quiet=True)
    samples = (result.path / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    drawn = [(row["prompt_id"], row["index"]) for row in map(json.loads, samples)]
    assert len(drawn) == len(set(drawn)) == 20  # the same prompt again draws other samples


def test_the_engine_sleeps_while_the_trainer_works_and_is_awake_when_asked(tmp_path, monkeypatch):
    state = {"awake": True, "naps": 0}
    original, generate = build.build_rollout_engine, HFEngine.generate

    def sleepy(*args, **kwargs):
        engine = original(*args, **kwargs)
        engine.sleep = lambda: state.update(awake=False, naps=state["naps"] + 1)
        engine.wake = lambda: state.update(awake=True)
        return engine

    def checked(self, requests, params):
        assert state["awake"]
        return generate(self, requests, params)

    def step(self, closure=None):
        assert not state["awake"]
        return guarded(self, closure)

    guarded = GuardedAdamW.step
    monkeypatch.setattr(build, "build_rollout_engine", sleepy)
    monkeypatch.setattr(HFEngine, "generate", checked)
    monkeypatch.setattr(GuardedAdamW, "step", step)
    rlalign.train(tiny_config(tmp_path, ["trainer.max_steps=2"]), quiet=True)
    assert state["naps"] >= 4


def test_skipped_steps_in_a_row_end_with_the_next_step_that_is_taken():
    progress = Progress()
    for skipped, taken in [(1, 0), (1, 3), (2, 0), (0, 0), (1, 0)]:  # (0, 0): nothing to learn from
        count_skipped(progress, UpdateResult(skipped_steps=skipped, optimizer_steps=taken))
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (5, 3)


def test_gradients_that_stay_non_finite_stop_the_run_with_its_last_step_recorded(
    tmp_path, monkeypatch
):
    forward = build.TorchEngine.backward
    monkeypatch.setattr(
        build.TorchEngine, "backward", lambda self, loss: forward(self, loss * torch.inf)
    )
    config = tiny_config(tmp_path, ["trainer.max_skipped_steps=2", "trainer.max_steps=9"])
    with pytest.raises(TrainingStopped, match="2 optimizer steps in a row"):
        rlalign.train(config, quiet=True)
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["optim/skipped_steps"] for line in lines] == [1, 1]
