"""Presets, overrides, and the combinations that are refused."""

import dataclasses
import warnings

import pytest
import torch

from rlalign import algos
from rlalign.algos import AlgoError, AlgoWarning
from rlalign.config import AlgoConfig

PRESETS = {
    "grpo": "grpo group token ppo_clip 0.2 0.2 seq-mean-token-mean 0.001 k3 loss",
    "dr_grpo": "grpo none token ppo_clip 0.2 0.2 seq-mean-token-sum-norm 0.0 k3 loss",
    "dapo": "grpo group token ppo_clip 0.2 0.28 token-mean 0.0 k3 loss",
    "bnpo": "grpo group token ppo_clip 0.2 0.2 token-mean-local 0.0 k3 loss",
    "gspo": "grpo group sequence ppo_clip 0.0003 0.0004 seq-mean-token-mean 0.0 k3 loss",
    "cispo": "grpo group token cispo None 4.0 token-mean 0.0 k3 loss",
    "rloo": "rloo none token ppo_clip 0.2 0.2 seq-mean-token-sum 0.03 k1 reward",
    "reinforce_plus_plus": "reinforce_plus_plus none token ppo_clip 0.2 0.2 token-mean 0.01 k1 "
    "reward",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline none token ppo_clip 0.2 0.2 "
    "token-mean 0.01 k2 loss",
    "raft": "raft none token reinforce None None seq-mean-token-mean 0.0 k3 loss",
    "raft++": "raft none token ppo_clip 0.2 0.28 seq-mean-token-mean 0.0 k3 loss",
    "copg": "rloo none token reinforce None None seq-mean-token-sum 0.06 k2 loss",
    "gvm_raft": "raft none token reinforce None None seq-mean-token-mean 0.0 k3 loss",
    "gvm_raft++": "raft none token ppo_clip 0.2 0.28 seq-mean-token-mean 0.0 k3 loss",
    "gvm_grpo": "grpo group token ppo_clip 0.2 0.2 seq-mean-token-mean 0.001 k3 loss",
    "cures_grpo": "grpo group token ppo_clip 0.2 0.2 seq-mean-token-mean 0.001 k3 loss",
    "cures_reinforce_plus_plus": "reinforce_plus_plus none token ppo_clip 0.2 0.2 token-mean 0.01 "
    "k1 reward",
    "reinforce_rej": "reinforce_rej none token ppo_clip 0.2 0.2 token-mean 0.0 k3 loss",
    "branch_grpo": "tree group token ppo_clip 0.2 0.2 token-mean 0.0 k3 loss",
    "dance_grpo": "tree group token ppo_clip 0.2 0.2 token-mean 0.0 k3 loss",
    "flow_grpo": "tree batch token ppo_clip 0.2 0.2 token-mean 0.04 k3 loss",
    "mix_grpo": "tree group token ppo_clip 0.2 0.2 token-mean 0.0 k3 loss",
    "spo": "tree none token ppo_clip 0.2 0.2 token-mean 0.0 k3 loss",
    "tree_rl": "tree none token ppo_clip 0.2 0.2 token-mean 0.0 k3 loss",
    "tree_po": "tree batch token ppo_clip 0.2 0.28 token-mean 0.0 k3 loss",
    "tree_grpo": "tree group token ppo_clip 0.2 0.2 token-mean 0.0 k3 loss",
    "bgpo": "grpo group sequence ppo_clip 0.2 0.2 seq-mean-token-mean 0.0 k2 loss",
    "diffu_grpo": "grpo none token ppo_clip 0.5 0.5 token-mean 0.04 k3 loss",
    "wd1": "grpo none token reinforce None None seq-mean-token-sum 0.0 k3 loss",
    "coupled_grpo": "rloo none token ppo_clip 0.5 0.5 token-mean 0.01 k3 loss",
    "spg": "grpo none sequence reinforce None None token-mean 0.0 k3 loss",
    "tracerl": "grpo group token ppo_clip 0.2 0.2 seq-mean-token-sum-norm 0.01 k3 loss",
    "espo": "grpo group sequence ppo_clip 0.2 0.2 seq-mean-token-mean 0.01 k2 loss",
    "vrpo": "rloo none sequence reinforce None None seq-mean-token-sum 0.1 k2 loss",
}
COLUMNS = (
    "adv_estimator",
    "scale_rewards",
    "importance_sampling_level",
    "policy_loss",
    "epsilon",
    "epsilon_high",
    "loss_agg_mode",
    "beta",
    "kl_estimator",
    "kl_in",
)


def quiet(**fields) -> AlgoConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlgoWarning)
        return algos.resolve(AlgoConfig(**fields))


def with_mismatch(**fields) -> AlgoConfig:
    cfg = AlgoConfig()
    return dataclasses.replace(cfg, mismatch=dataclasses.replace(cfg.mismatch, **fields))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_expand_to_the_published_settings(name):
    resolved = quiet(loss_type=name)
    assert " ".join(str(getattr(resolved, column)) for column in COLUMNS) == PRESETS[name]
    printed = dict(algos.expansion(name))
    assert {key: printed[key] for key in COLUMNS} == {
        key: getattr(resolved, key) for key in COLUMNS
    }


def test_the_registry_holds_exactly_these():
    assert algos.names() == sorted(PRESETS)


@pytest.mark.parametrize("name", [*PRESETS, "reinforce++", "reinforce++_baseline"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"policy_loss": "ppo_clip", "epsilon": 0.1},
        {"policy_loss": "cispo", "loss_agg_mode": "seq-mean-token-mean"},
        {"policy_loss": "reinforce", "epsilon": None},
        {"adv_estimator": "rloo"},
        {"kl_in": "reward", "beta": 0.5},
        {"kl_estimator": "low_var_kl", "kl_in": "loss"},
    ],
)
def test_resolving_twice_changes_nothing(name, fields):
    if name == "copg" and "loss_agg_mode" in fields:
        pytest.skip("CoPG has one loss per prompt")
    if set(algos.get(name).fixed) & set(fields):
        pytest.skip("the algorithm brings its own")
    per_sequence = PRESETS.get(name, "").split()[2:3] == ["sequence"]
    if per_sequence and fields.get("kl_in") == "reward" and "kl_estimator" in algos.get(name).fixed:
        pytest.skip("its KL is in the loss")
    refused_of_trees = "loss_agg_mode" in fields or fields.get("kl_in") == "reward"
    if PRESETS.get(name, "").startswith("tree") and refused_of_trees:
        pytest.skip("trees weigh edges, and have no KL in the reward")
    once = quiet(loss_type=name, **fields)
    assert dataclasses.asdict(quiet(**_shallow(once))) == dataclasses.asdict(once)
    for key, value in fields.items():
        if value is not None and key != "kl_estimator":
            assert getattr(once, key) == value


def _shallow(cfg: AlgoConfig) -> dict:
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}


def test_resolving_leaves_the_given_config_alone():
    cfg = AlgoConfig(loss_type="dapo")
    algos.resolve(cfg, engine_shares_parameters=False)
    assert cfg == AlgoConfig(loss_type="dapo")


def test_settings_that_belong_to_a_decision_follow_it_when_it_is_overridden():
    assert quiet(policy_loss="cispo").epsilon is None  # cispo's own default: no lower bound
    assert quiet(policy_loss="cispo").epsilon_high == 4.0
    assert quiet(policy_loss="cispo", epsilon=0.2).epsilon == 0.2
    assert quiet(loss_type="cispo", policy_loss="ppo_clip").epsilon_high == 0.2
    assert quiet(adv_estimator="rloo").scale_rewards == "none"
    assert quiet(loss_type="rloo", adv_estimator="grpo").scale_rewards == "group"
    assert quiet(kl_in="reward").kl_estimator == "k1"
    assert quiet(loss_type="rloo", kl_in="loss").kl_estimator == "k3"
    assert quiet(loss_type="gspo", epsilon=0.1).epsilon_high == 4e-4  # the preset's own
    assert quiet(epsilon=0.1).epsilon_high == 0.1


@pytest.mark.parametrize(
    ("alias", "name"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3"), ("k3+", "k3+")]
)
def test_kl_aliases(alias, name):
    assert quiet(kl_estimator=alias).kl_estimator == name


@pytest.mark.parametrize(("shares", "level"), [(True, "none"), (False, "token"), (None, "auto")])
def test_auto_correction_follows_the_engine(shares, level):
    resolved = algos.resolve(AlgoConfig(), engine_shares_parameters=shares)
    assert resolved.mismatch.rollout_is == level


def test_an_explicit_correction_is_kept_whatever_the_engine():
    cfg = with_mismatch(rollout_is="sequence")
    assert algos.resolve(cfg, engine_shares_parameters=True).mismatch.rollout_is == "sequence"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss_type": "gropo"}, "did you mean 'grpo'"),
        ({"loss_type": "no.such.module:X"}, "cannot be imported"),
        ({"loss_type": "math:pi"}, "not an rlalign.algos.Algorithm"),
        ({"loss_type": "gspo", "loss_agg_mode": "token-mean"}, "multiply by its length"),
        (
            {"importance_sampling_level": "sequence_sum", "loss_agg_mode": "seq-mean-token-sum"},
            "multiply by its length",
        ),
        ({"loss_type": "rloo", "scale_rewards": "group"}, "algo.scale_rewards=group has no effect"),
        ({"delta": 1.1}, "must exceed 1 \\+ epsilon_high"),
        ({"loss_type": "cispo", "delta": 5.0}, "algo.delta=5.0 has no effect"),
        ({"policy_loss": "reinforce", "epsilon": 0.2}, "no effect with policy_loss=reinforce"),
        ({"epsilon": 1.0}, "lower clip at or below 0"),
        ({"num_generations": 1}, "every advantage 0"),
        ({"loss_scale_factor": 10.0}, "use seq-mean-token-sum-norm"),
        ({"use_bias_correction_kl": True, "kl_in": "reward"}, "no effect with kl_in=reward"),
        ({"loss_type": "reinforce++", "normalize_advantages": True}, "whiten twice"),
    ],
)
def test_combinations_without_sense_are_refused_with_the_reason(fields, says):
    with pytest.raises(AlgoError, match=says):
        algos.resolve(AlgoConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rollout_is_max": 0.5}, "excludes 1"),
        ({"rollout_is_min": 1.5}, "excludes 1"),
        ({"rollout_is": "sequence_geomean"}, "rollout_is_mode=mask"),
        ({"rollout_is": "token", "bypass_mode": True}, "correct twice"),
    ],
)
def test_corrections_without_sense_are_refused_with_the_reason(fields, says):
    with pytest.raises(AlgoError, match=says):
        algos.resolve(with_mismatch(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"kl_estimator": "k1", "kl_in": "loss", "beta": 0.1},
        {"kl_estimator": "k3", "kl_in": "reward", "beta": 0.1},
        {"kl_estimator": "k2", "kl_in": "reward", "beta": 0.1},
        {"kl_estimator": "k2", "use_bias_correction_kl": True, "beta": 0.1},
        {"loss_type": "raft", "kl_in": "reward", "beta": 0.1},
        {"loss_type": "copg", "kl_in": "reward"},
        {"loss_type": "copg", "entropy_coef": 0.1},
    ],
)
def test_a_kl_that_is_not_what_it_seems_is_warned_about(fields):
    with pytest.warns(AlgoWarning, match="algo"):
        algos.resolve(AlgoConfig(**fields))


def test_no_preset_warns_and_no_kl_means_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in algos.names():
            algos.resolve(AlgoConfig(loss_type=name))
        algos.resolve(AlgoConfig(kl_estimator="k1", kl_in="loss", beta=0.0))
        algos.resolve(AlgoConfig(kl_estimator="k1", use_bias_correction_kl=True, beta=0.1))


def test_the_reference_is_needed_only_for_a_kl():
    assert algos.needs_reference(quiet(loss_type="grpo"))
    assert not algos.needs_reference(quiet(loss_type="grpo", beta=0.0))
    assert not algos.needs_reference(quiet(loss_type="dapo"))


@pytest.mark.parametrize(
    ("fields", "mismatch", "needed"),
    [
        ({}, {}, False),
        ({"num_minibatches": 2}, {}, True),
        ({"num_iterations": 2}, {}, True),
        ({"loss_type": "rloo"}, {}, True),
        ({"loss_type": "rloo", "beta": 0.0}, {}, False),
        ({}, {"rollout_is": "token", "rollout_is_batch_normalize": True}, True),
        ({}, {"rollout_is": "none", "rollout_is_batch_normalize": True}, False),
        ({"num_minibatches": 2}, {"bypass_mode": True}, False),
    ],
)
def test_when_a_forward_pass_for_the_old_policy_is_needed(fields, mismatch, needed):
    cfg = AlgoConfig(**fields)
    cfg = dataclasses.replace(cfg, mismatch=dataclasses.replace(cfg.mismatch, **mismatch))
    assert algos.needs_old_logp(algos.resolve(cfg, engine_shares_parameters=True)) is needed


def test_an_algorithm_of_the_users_own_takes_its_own_decisions(tmp_path, monkeypatch):
    (tmp_path / "my_algorithms.py").write_text(
        "from rlalign.algos import Algorithm\n"
        "def credit(reward_B, acc_B, group_id_B, mask_BT, cfg, *, kl_BT=None):\n"
        "    return mask_BT * (acc_B[:, None] - 0.25)\n"
        "MINE = Algorithm('mine', 'summary', 'source', {'epsilon': 0.15}, credit=credit)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = quiet(loss_type="my_algorithms:MINE")
    assert (cfg.epsilon, cfg.epsilon_high, cfg.beta) == (0.15, 0.15, 0.0)
    assert ("credit", "my_algorithms.credit") in algos.expansion("my_algorithms:MINE")
    acc_B = torch.tensor([1.0, 0.0])
    advantage_BT = algos.compute_advantages(
        torch.zeros(2), acc_B, torch.tensor([0, 0]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]), cfg
    )
    assert advantage_BT.tolist() == [[0.75, 0.0], [-0.25, -0.25]]


def test_a_preset_that_names_an_unknown_field_is_refused():
    with pytest.raises(AlgoError, match="epsilon_hi"):
        algos.Algorithm("typo", "", "", {"epsilon_hi": 0.3})


ESTIMATES = {  # estimator, num_mc_samples, prompt_mask_prob, fresh_masks, kl_to, norm
    "bgpo": "count_strat 16 0.0 False reference valid",
    "diffu_grpo": "all_masked 1 0.15 True reference valid",
    "wd1": "all_masked 1 0.15 True reference none",
    "coupled_grpo": "complement 2 0.0 True reference valid",
    "spg": "block_noise 2 0.15 True reference none",
    "tracerl": "trace 1 0.0 False old valid",
    "espo": "coupled 2 0.0 True reference canvas",
    "vrpo": "count_strat 8 0.0 False reference none",
    "grpo": "count_strat 16 0.0 False reference valid",
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_presets_say_how_log_probs_are_estimated(name):
    found = quiet(loss_type=name).likelihood
    columns = ("estimator", "num_mc_samples", "prompt_mask_prob", "fresh_masks", "kl_to", "norm")
    assert " ".join(str(getattr(found, column)) for column in columns) == ESTIMATES[name]
    assert algos.likelihood_preset(quiet(loss_type=name)) == found


def test_length_divides_where_a_clip_needs_it():
    assert quiet(loss_type="bgpo", policy_loss="unclipped").likelihood.norm == "none"
    assert quiet(loss_type="bgpo").likelihood.norm == "valid"


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": "bgpo", "importance_sampling_level": "token"},
        {"loss_type": "espo", "kl_estimator": "k3"},
        {"loss_type": "spg", "policy_loss": "ppo_clip"},
        {"loss_type": "wd1", "adv_estimator": "rloo"},
        {"loss_type": "vrpo", "loss_agg_mode": "token-mean"},
    ],
)
def test_a_decision_that_the_algorithm_takes_itself_is_refused(fields):
    with pytest.raises(AlgoError, match="has no effect with loss_type"):
        algos.resolve(AlgoConfig(**fields))
