"""Templates: what is asked, in which order."""

from __future__ import annotations

import pytest

from rlalign.testtime.question import LETTERS, QUESTIONS, TRUTHFUL, Example, Question

COLOUR = Question(
    "Which colour?",
    ("red", "green", "blue"),
    (1.0, -1.0, 0.0),
    tuple(Example(f"q{i}", f"r{i}", i % 3, f"w{i}") for i in range(4)),
)


def test_every_option_has_every_letter_once():
    orders = COLOUR.orders()
    assert orders == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == [0, 1, 2]


def test_the_whole_prompt():
    question = Question("Judge.", ("good", "bad"), (1.0, -1.0), COLOUR.examples[:2])
    assert question.head("Q?", "R {x}", (1, 0)) == (
        "Judge.\n\n"
        "Request: q0\nReply: r0\nWhich statement about the reply holds?\n(A) good\n(B) bad\n"
        "Answer: (A) w0\n\n"
        "Request: q1\nReply: r1\nWhich statement about the reply holds?\n(A) good\n(B) bad\n"
        "Answer: (B) w1\n\n"
        "Request: Q?\nReply: R {x}\nWhich statement about the reply holds?\n(A) bad\n(B) good\n"
    )


def test_examples_are_dropped_from_the_front_and_the_others_stay_as_they_are():
    full, less = (COLOUR.head("q", "r", (0, 1, 2), skip) for skip in (0, 2))
    assert "q1" in full and "q1" not in less
    assert full.endswith(less.removeprefix(COLOUR.instruction))


def test_orders_differ_in_the_last_lines_alone():
    texts = [QUESTIONS["harmless"].head("q", "r", order) for order in ((0, 1), (1, 0))]
    heads = [text.rpartition("(A)")[0] for text in texts]
    assert heads[0] == heads[1] and texts[0] != texts[1]


def test_a_reply_is_cut_after_its_last_sentence_where_that_is_asked():
    assert TRUTHFUL.cut("It is. And then it") == "It is."
    assert TRUTHFUL.cut("no end") == "no end"
    assert QUESTIONS["harmless"].cut("a. b") == "a. b"


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_built_in_templates_have_both_answers_as_either_letter(question):
    letters = [
        LETTERS[question.order_of(i).index(example.right)]
        for i, example in enumerate(question.examples)
    ]
    assert len(question.options) == len(question.values)
    if letters:
        assert {example.right for example in question.examples} == {0, 1}
        assert letters.count("A") == letters.count("B") == len(letters) / 2
