"""The whole loop on a small random model: engine and trainer agree at every step, the reward rises,
and what each preset needs is there."""

import json

import pytest

import rlalign
from rlalign import algos
from rlalign.rewards import RewardError
from rlalign.rollout.hf import HFEngine
from rlalign.trainer.publish import WeightSyncError
from tests.support import ROOT, tiny_config


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


@pytest.mark.parametrize("name", algos.names())
def test_every_preset_takes_steps(name, tmp_path):
    overrides = [f"algo.loss_type={name}", "algo.beta=null", "trainer.max_steps=2"]
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
