"""reasoning-gym: its questions, its own verifier, and held-out questions that are others."""

from __future__ import annotations

import sys

import pytest

from rlalign.config import TaskConfig
from rlalign.models.tokenizer import build_tokenizer
from rlalign.tasks import TaskError, load_prompts

TOKENIZER = build_tokenizer()


def load(task: str, split: str = "train", **settings):
    return load_prompts(
        TaskConfig(train=f"reasoning_gym:{task}", **settings), TOKENIZER, split=split
    )


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskError, match=r"pip install 'rlalign\[envs\]'"):
        load("chain_sum")


def test_rows_are_those_of_the_library():
    library = pytest.importorskip("reasoning_gym")
    params = {"size": 5, "seed": 7, "max_terms": 3}
    prompts = load("chain_sum", params=params)
    expected = library.create_dataset("chain_sum", **params)
    assert [(p.source, p.answer, p.columns["metadata"]) for p in prompts] == [
        (item["question"], item["answer"], item["metadata"]) for item in expected
    ]
    assert prompts[4].id == "reasoning_gym:chain_sum@7/4"


def test_held_out_questions_are_others():
    pytest.importorskip("reasoning_gym")
    settings = {"eval": "reasoning_gym:chain_sum", "params": {"size": 50, "min_digits": 3}}
    train, held = load("chain_sum", **settings), load("chain_sum", "eval", **settings)
    assert len(held) == 50
    assert not {p.source for p in train} & {p.source for p in held}


def test_the_reward_is_the_tasks_own_verdict():
    pytest.importorskip("reasoning_gym")
    from rlalign.tasks.reasoning_gym import reward

    prompts = load("basic_arithmetic", params={"size": 3})
    columns = {name: [p.columns[name] for p in prompts] for name in prompts.columns[1:]}
    gold = [p.answer for p in prompts]
    completions = [
        f"<think>..</think><answer> {gold[0]} </answer>",
        "<answer>no idea</answer>",
        [{"role": "assistant", "content": gold[2]}],
    ]
    sources = [p.source for p in prompts]
    scores = reward(sources, completions, answer=gold, **columns)
    assert scores[0] == scores[2] == 1.0 and scores[1] < 0.1


@pytest.mark.parametrize(
    ("task", "params", "part"),
    [
        ("chainsum", {}, "chain_sum"),
        ("chain_sum", {"min_termz": 1}, "min_termz"),
        ("chain_sum", {"min_terms": -1}, "min_terms"),
    ],
)
def test_wrong_names_and_values(task, params, part):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(TaskError, match=part):
        load(task, params=params)
