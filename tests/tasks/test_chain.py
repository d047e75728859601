"""The chain task: right answers, values in range, a clean held-out split, mistakes as meant."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.tasks import TaskError
from rlalign.tasks.chain import (
    Mistakes,
    chains,
    check_completion,
    demonstrate,
    demonstrations,
    draw_chain,
    held_out,
    make_rows,
)


def partial_sums(question: str) -> list[int]:
    """Every running value, by Python's own evaluation of each prefix of the question."""
    body = question.removesuffix("=?")
    ends = [match.start() for match in re.finditer(r"[+-]", body)] + [len(body)]
    return [eval(body[:end]) for end in ends]


@given(st.integers(0, 2**32), st.integers(2, 5))
def test_a_chain_is_what_python_makes_of_it_and_stays_in_range(seed, num_terms):
    chain = draw_chain(random.Random(seed), num_terms)
    values = partial_sums(chain.prompt)
    assert len(values) == num_terms
    assert list(chain.values) == values
    assert chain.answer == str(values[-1])
    assert all(0 <= value <= 99 for value in values)


@given(st.integers(0, 2**32), st.integers(2, 5))
def test_a_right_demonstration_writes_each_step_and_is_right(seed, num_terms):
    chain = draw_chain(random.Random(seed), num_terms)
    completion = demonstrate(chain, random.Random(seed))
    steps = re.fullmatch(r"<think>(.*)</think><answer>(\d+)</answer>", completion, re.DOTALL)
    assert steps is not None
    lines = steps.group(1).split("\n")
    assert len(lines) == num_terms - 1
    for line, before in zip(lines, partial_sums(chain.prompt), strict=False):
        left, right = line.split("=")
        assert eval(left) == int(right) and left.startswith(str(before))
    assert int(steps.group(2)) == partial_sums(chain.prompt)[-1]
    assert check_completion(chain.prompt, completion)


@given(st.integers(0, 2**32), st.integers(2, 5))
def test_every_forgotten_carry_is_off_by_ten_and_in_range(seed, num_terms):
    chain = draw_chain(random.Random(seed), num_terms)
    completion = demonstrate(chain, random.Random(seed), Mistakes(carry=1.0))
    for left, right in re.findall(r"(\d+[+-]\d)=(\d+)", completion):
        value, said = eval(left), int(right)
        assert 0 <= said <= 99
        start = int(re.match(r"\d+", left).group())
        no_carry = value // 10 == start // 10
        assert said == value or (not no_carry and abs(said - value) == 10)


def test_the_answer_follows_from_the_mistaken_steps():
    for prompt, completion in itertools.islice(demonstrations(0, "x", Mistakes(0.6, 0.05)), 300):
        last = re.findall(r"=(\d+)", completion)[-1]
        assert completion.endswith(f"<answer>{last}</answer>")
        assert check_completion(prompt, completion) == (int(last) == partial_sums(prompt)[-1])


def test_rates_of_mistakes_are_those_asked_for():
    pairs = list(itertools.islice(demonstrations(3, "x", Mistakes(0.6, 0.05, 0.15)), 4000))
    skipped = [completion for _, completion in pairs if "<think></think>" in completion]
    assert len(skipped) / len(pairs) == pytest.approx(0.15, abs=0.02)
    steps = [
        (int(start), eval(start + term), int(said))
        for _, completion in pairs
        for start, term, said in re.findall(r"(\d+)([+-]\d)=(\d+)", completion)
    ]
    carries = [(value, said) for start, value, said in steps if start // 10 != value // 10]
    forgotten = [1 for value, said in carries if abs(value - said) == 10]
    assert len(forgotten) / len(carries) == pytest.approx(0.6, abs=0.05)
    plain = [abs(value - said) for start, value, said in steps if start // 10 == value // 10]
    assert set(plain) == {0, 1}
    assert sum(plain) / len(plain) == pytest.approx(0.05, abs=0.015)


def test_splits_share_no_question_whatever_the_seed():
    train = {row["prompt"] for seed in (0, 1) for row in make_rows("train", size=5000, seed=seed)}
    held = {row["prompt"] for seed in (0, 7) for row in make_rows("eval", size=500, seed=seed)}
    shown = {prompt for prompt, _ in itertools.islice(demonstrations(0, "x", Mistakes()), 3000)}
    assert not held & (train | shown)
    assert all(map(held_out, held)) and not any(map(held_out, train | shown))


def test_one_question_in_ten_is_held_out():
    rng = random.Random(0)
    share = sum(held_out(draw_chain(rng, 4).prompt) for _ in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=0.01)


def test_rows_are_a_function_of_the_seed_and_small_sets_are_prefixes():
    rows = make_rows("train", size=200, seed=4)
    assert rows == make_rows("train", size=200, seed=4)
    assert rows[:50] == make_rows("train", size=50, seed=4)
    assert rows != make_rows("train", size=200, seed=5)
    assert len({row["prompt"] for row in rows}) == 200
    assert make_rows("train", size=2) == [
        {"prompt": "43+2=?", "answer": "45", "num_terms": 2},
        {"prompt": "13-1-4+3-6=?", "answer": "5", "num_terms": 5},
    ]


def test_terms_are_evenly_spread_and_can_be_narrowed():
    counts = [row["num_terms"] for row in make_rows("train", size=4000)]
    assert [counts.count(n) / 4000 for n in (2, 3, 4, 5)] == pytest.approx([0.25] * 4, abs=0.06)
    assert {row["num_terms"] for row in make_rows("eval", size=50, min_terms=4)} == {4, 5}


@pytest.mark.parametrize("params", [{"size": 0}, {"min_terms": 1}, {"max_terms": 6}])
def test_parameters_out_of_range_are_named(params):
    (name, value), *_ = params.items()
    with pytest.raises(TaskError, match=f"{name}={value}"):
        make_rows("train", **params)


def test_more_questions_than_there_are_is_an_error_not_a_hang():
    with pytest.raises(TaskError, match="only about"):
        make_rows("eval", size=5000, max_terms=2)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("<answer>83</answer>", True),
        ("<think>no steps</think><answer>083</answer>", True),
        ("<answer>82</answer>", False),
        ("83", False),
        ("<answer></answer>", False),
        ("", False),
    ],
)
def test_only_a_tagged_right_number_is_right(completion, right):
    assert check_completion("84-9+8=?", completion) is right


def test_chains_of_both_splits_never_end():
    assert len(list(itertools.islice(chains("eval", 0), 100))) == 100
