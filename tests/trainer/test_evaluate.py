"""pass@k against enumeration, intervals against simulation, and what counts when grading fails."""

import itertools
import math
import random

import pytest
import torch

from rlalign.trainer.evaluate import final_answer, half_width, pass_at_k, summarize
from rlalign.types import Group, Prompt, Sample, VersionSpan


def group(name: str, *texts: str) -> Group:
    samples = tuple(
        Sample(name, i, (1,), (0.0,), "stop", (VersionSpan(1, 0),), text)
        for i, text in enumerate(texts)
    )
    return Group(Prompt(name, (1,), name), samples)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_equals_enumeration_of_all_draws(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_the_interval_covers_the_true_rate_about_95_times_in_100():
    generator = random.Random(0)
    covered = 0
    for _ in range(1000):
        rates = [float(generator.random() < 0.8) for _ in range(200)]
        covered += abs(sum(rates) / 200 - 0.8) <= half_width(rates)
    assert 920 <= covered <= 980


def test_the_interval_does_not_vanish_when_all_are_right():
    assert 0.01 < half_width([1.0] * 100) < 0.05


def test_unscorable_samples_leave_their_prompt_and_are_counted():
    groups = [group("a", "1", "2"), group("b", "3", "4")]
    result = summarize(groups, torch.tensor([1.0, math.nan, math.nan, math.nan]))
    assert result.metrics["pass@1"] == 1.0
    assert result.metrics["unscorable"] == 0.75
    assert (result.num_prompts, result.num_unscorable) == (2, 3)


def test_figures_of_a_hand_made_case():
    groups = [
        group("a", "<answer>1</answer>", "x <answer>1</answer>", "<answer>2</answer>", "none"),
        group("b", "7", "8", "8", "9"),
    ]
    acc_B = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0])
    metrics = summarize(groups, acc_B).metrics
    assert metrics["pass@1"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert metrics["pass@2"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2)
    assert metrics["pass@4"] == 1.0
    assert metrics["majority"] == pytest.approx((1.0 + 0.0) / 2)


def test_nothing_scorable_gives_no_figures_rather_than_zero():
    assert summarize([group("a", "x")], torch.tensor([math.nan])).metrics == {"unscorable": 1.0}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1</think><answer> 12 </answer>", "12"),
        ("<answer>1</answer> no, <answer>2", "2"),
        ("so it is\n 7 \n", "7"),
        ("", ""),
    ],
)
def test_votes_go_by_the_final_answer(text, answer):
    assert final_answer(text) == answer
