"""A config either says exactly what runs, or is refused with the key, the value and the remedy."""

import dataclasses

import pytest

from rlalign.config import Config, ConfigError, all_keys, parse_config, schema, to_yaml
from rlalign.config.load import parse
from rlalign.config.testtime import RainConfig

MINIMAL = {
    "name": "x",
    "model": {"path": "mini:chain"},
    "task": {"train": "mini:chain"},
    "rewards": {"functions": [{"name": "exact_match"}]},
}


def error(*overrides: str, **sections) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **sections}, list(overrides))
    return str(caught.value)


def test_overrides_win_over_the_file_and_later_over_earlier():
    config = parse_config(
        {**MINIMAL, "seed": 1}, ["seed=2", "seed=3", "trainer.optim.learning_rate=5e-4"]
    )
    assert (config.seed, config.trainer.optim.learning_rate) == (3, 5e-4)


def test_the_printed_config_reads_back_as_the_same_config(tmp_path):
    config = parse_config(MINIMAL, ["algo.epsilon=0.1", "task.params={size: 12}"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse_config(path) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("algo.epsilonn=1", ["algo.epsilonn", "'algo.epsilon'"]),
        ("trainer.learning_rate=1", ["'trainer.optim.learning_rate'"]),
        ("trainr.max_steps=1", ["trainr", "'trainer'"]),
        ("trainer.zero_stage=4", ["trainer.zero_stage", "4", ">= 0 and <= 3"]),
        ("trainer.max_steps=0", ["trainer.max_steps", "0", ">= 1"]),
        ("trainer.max_steps=ten", ["trainer.max_steps", "ten", "int"]),
        ("rollout.temperature=nan", ["rollout.temperature", "nan", "> 0"]),
        ("rollout.top_p=1.5", ["rollout.top_p", "1.5", "<= 1"]),
        ("seed=4294967296", ["seed", "<= 4294967295"]),
        ("rollout.engine=vlm", ["rollout.engine", "vlm", "hf, vllm", "'vllm'"]),
        ("rewards.functions=[{nam: x}]", ["rewards.functions[0].nam", "name"]),
        ("rewards.functions=[{name: x, weight: heavy}]", ["weight", "heavy"]),
        ("trainer.max_steps", ["trainer.max_steps", "key=value"]),
        ("model=tiny", ["model", "tiny", "mapping"]),
    ],
)
def test_a_wrong_override_names_the_key_the_value_and_the_remedy(override, parts):
    message = error(override)
    for part in parts:
        assert part in message, message


def test_a_wrong_value_inside_a_list_is_found():
    message = error("algo.filter_groups.metric=length")
    assert "algo.filter_groups.metric" in message and "acc, reward" in message


def test_required_keys_are_listed_together():
    with pytest.raises(ConfigError, match=r"model\.path.*task\.train"):
        parse_config({"name": "x"})


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "mini.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=r"mini\.yaml"):
        parse_config(tmp_path / "mimi.yaml")


def test_malformed_yaml_gives_the_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nalgo: [unclosed\n")
    with pytest.raises(ConfigError, match="line"):
        parse_config(path)


def test_a_section_given_twice_is_refused_rather_than_half_used(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("name: x\ntrainer: {max_steps: 3}\nseed: 1\ntrainer: {packing: false}\n")
    with pytest.raises(ConfigError, match="duplicate key trainer"):
        parse_config(path)


def test_a_number_is_a_number_in_a_file_as_on_the_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(to_yaml(parse_config(MINIMAL)) + "extends: null\n")
    text = path.read_text().replace("params: {}", "params: {scale: 1e-3}", 1)
    path.write_text(text)
    from_file = parse_config(path).task.params
    assert from_file == parse_config(MINIMAL, ["task.params={scale: 1e-3}"]).task.params
    assert from_file == {"scale": 0.001}


def test_a_reference_to_nothing_is_named():
    message = error("task.system_prompt=${oops}")
    assert "task.system_prompt" in message and "oops" in message


def test_a_file_extends_another_and_wins_over_it(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.yaml").write_text(to_yaml(parse_config(MINIMAL, ["seed=4"])))
    child = tmp_path / "b.yaml"
    child.write_text("extends: base/a.yaml\nname: child\nalgo: {loss_type: gspo}\n")
    config = parse_config(child)
    assert (config.name, config.seed, config.algo.loss_type) == ("child", 4, "gspo")


def test_a_circle_of_files_is_an_error_not_a_hang(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        parse_config(tmp_path / "a.yaml")


def test_every_default_lies_in_its_own_range():
    parse_config(MINIMAL)


def config_classes():
    return [c for c in vars(schema).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]


def test_no_config_class_has_over_thirty_fields_and_every_field_has_a_sentence():
    for kind in config_classes():
        fields = dataclasses.fields(kind)
        assert len(fields) <= 30, kind
        for field in fields:
            assert field.metadata["doc"].endswith("."), (kind, field.name)


def test_all_keys_lists_each_leaf_once():
    keys = list(all_keys(Config))
    assert len(keys) == len(set(keys))
    assert "trainer.optim.learning_rate" in keys and "algo.filter_groups.metric" in keys


def test_names_inside_sections_are_explained():
    with pytest.raises(ConfigError, match=r"sections are mappings: \{'rollout': \{'temperature'"):
        parse(RainConfig, {"rollout.temperature": 0.5})
    with pytest.raises(ConfigError, match=r"did you mean 'judge\.\w+'"):
        parse(RainConfig, {"judge": {"xyzzy": 1}})
    with pytest.raises(ConfigError, match=r"did you mean 'rollout\.boundary'"):
        parse(RainConfig, {"rollout": {"bound": 1}})
