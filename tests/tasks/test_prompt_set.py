"""Order and digest: every prompt once an epoch, a pure function of (seed, position)."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from rlalign.tasks import LoadReport, PromptSet
from rlalign.types import Prompt


def prompt_set(size: int, seed: int = 0, shuffle: bool = True) -> PromptSet:
    prompts = [Prompt(f"s/{i}", (i + 1,), f"q{i}", str(i), {"level": i % 3}) for i in range(size)]
    return PromptSet(prompts, LoadReport("s", size), seed=seed, shuffle=shuffle)


@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 5))
def test_every_epoch_holds_each_row_once(size, seed, epoch):
    assert sorted(prompt_set(size, seed).order(epoch)) == list(range(size))


@given(st.integers(1, 17), st.lists(st.integers(1, 23), min_size=1, max_size=12), st.booleans())
def test_takes_of_any_sizes_are_one_stream_of_epochs(size, counts, shuffle):
    prompts = prompt_set(size, seed=3, shuffle=shuffle)
    stream, position = [], 0
    for count in counts:
        stream += prompts.take(position, count)
        position += count
    expected = [row for epoch in range(position // size + 1) for row in prompts.order(epoch)]
    assert [p.id for p in stream] == [f"s/{row}" for row in expected[:position]]


def test_a_resumed_run_takes_what_the_uninterrupted_one_would():
    whole, again = prompt_set(50, seed=1), prompt_set(50, seed=1)
    uninterrupted = [p.id for step in range(20) for p in whole.take(step * 8, 8)]
    resumed = [p.id for step in range(9, 20) for p in again.take(step * 8, 8)]
    assert resumed == uninterrupted[9 * 8 :]


def test_seed_and_epoch_change_the_order_and_no_shuffle_keeps_it():
    prompts = prompt_set(30)
    assert prompts.order(0) != prompts.order(1)
    assert prompts.order(0) != prompts.order(0, seed=9) == prompt_set(30, seed=9).order(0)
    assert prompt_set(30, shuffle=False).order(5) == list(range(30))


def test_the_order_of_a_seed_is_pinned():
    assert prompt_set(6).order(0) == [5, 4, 1, 2, 0, 3]


def test_digest_sees_every_field_and_the_order():
    base = prompt_set(5)
    assert base.digest == prompt_set(5, seed=8).digest  # of the data, not of the run
    changes = [
        {"id": "other/2"},
        {"token_ids": (99,)},
        {"source": "Q2"},
        {"answer": 2},  # the number, not the text "2"
        {"columns": {"level": 7}},
    ]
    digests = {base.digest}
    for change in changes:
        rows = list(base)
        rows[2] = dataclasses.replace(rows[2], **change)
        digests.add(PromptSet(rows, base.report).digest)
    digests.add(PromptSet(list(base)[::-1], base.report).digest)
    assert len(digests) == len(changes) + 2


def test_columns_are_those_that_any_prompt_has():
    assert prompt_set(3).columns == ("answer", "level")
    unanswered = [Prompt("s/0", (1,), "q"), Prompt("s/1", (1,), "q", None, {"b": 1})]
    assert PromptSet(unanswered, LoadReport("s", 2)).columns == ("b",)
