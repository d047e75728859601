"""Sorting tasks: what a row says, which questions are held out, how often a demonstration errs."""

import itertools

import pytest

from rlalign.tasks.mini import get_mini_task
from rlalign.tasks.sort import demonstrations, is_correct, is_held_out


@pytest.mark.parametrize(("name", "num_digits"), [("sort6", 6), ("sort16", 16)])
def test_rows_ask_for_their_digits_in_order(name, num_digits):
    for row in get_mini_task(name).make_rows("train", size=50):
        question, equals = row["prompt"][:-1], row["prompt"][-1]
        assert equals == "=" and len(question) == num_digits
        assert list(row["answer"]) == sorted(question)
        assert is_correct(row["prompt"], row["answer"])
        assert not is_correct(row["prompt"], row["answer"][::-1] + "0")


def test_held_out_questions_are_in_no_training_row_or_demonstration():
    task = get_mini_task("sort6")
    held_out = {row["prompt"] for row in task.make_rows("eval")}
    assert len(held_out) > 150 and all(is_held_out(prompt[:-1]) for prompt in held_out)
    train = {row["prompt"] for row in task.make_rows("train", size=5000)}
    shown = {prompt for prompt, _ in itertools.islice(demonstrations(0, 6), 5000)}
    assert not held_out & (train | shown)


def test_rows_are_those_of_their_seed():
    make_rows = get_mini_task("sort6").make_rows
    assert make_rows("train", size=5, seed=1) == make_rows("train", size=9, seed=1)[:5]
    assert make_rows("train", size=5, seed=1) != make_rows("train", size=5, seed=2)


def test_most_demonstrations_are_wrong_in_one_or_two_places():
    wrong = []
    for prompt, answer in itertools.islice(demonstrations(0, 6), 2000):
        right = sorted(prompt[:-1])
        wrong.append(sum(a != b for a, b in zip(answer, right, strict=True)))
    assert max(wrong) == 2
    # Corrupted with 0.7; one in eight replacements is the right digit again.
    assert 0.6 < sum(count > 0 for count in wrong) / len(wrong) < 0.7
