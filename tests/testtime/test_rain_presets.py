"""The shipped settings of RAIN, and what they make of its judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlalign.config.load import ConfigError, parse
from rlalign.config.testtime import JudgeConfig, RainConfig
from rlalign.testtime.question import QUESTIONS
from rlalign.testtime.self_evaluation import AGGREGATES

ROOT = Path(__file__).resolve().parent.parent.parent


def preset(name: str) -> RainConfig:
    return parse(RainConfig, ROOT / f"configs/rain/{name}.yaml")


def test_the_presets_are_those_of_the_published_code():
    """Its three scripts, by hand; the paper's fourth task has no settings."""
    assert {path.stem for path in (ROOT / "configs/rain").glob("*.yaml")} == {
        "hh", "advbench", "truthfulqa", "imdb",
    }  # fmt: skip
    found = [
        (cfg.min_visits, cfg.candidate_temperature, cfg.num_attempts, cfg.judge.question)
        for cfg in map(preset, ("hh", "advbench", "truthfulqa", "imdb"))
    ]
    assert found == [
        (6, 1.0, 0, "harmless"), (5, 2.0, 19, "harmless"), (16, 1.0, 0, "truthful"),
        (6, 1.0, 0, "positive"),
    ]  # fmt: skip
    assert preset("hh").rollout.turn_marker == "\n\nHuman:"
    assert preset("advbench").rollout.boundary == RainConfig().rollout.boundary == ",.?:;\n"
    assert preset("truthfulqa").rollout.boundary == ""


def test_the_judge_may_be_any_question_there_is():
    for question in QUESTIONS:
        for how in AGGREGATES:
            cfg = parse(RainConfig, {}, [f"judge.question={question}", f"judge.how={how}"])
            assert cfg.judge == JudgeConfig(question, how)
    with pytest.raises(ConfigError, match="harmless, truthful, positive"):
        parse(RainConfig, {}, ["judge.question=kind"])
