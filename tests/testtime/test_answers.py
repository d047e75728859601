"""Where an answer stands, and which answers are the same."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.rewards.verdict import RewardError
from rlalign.testtime.answers import as_number, canonical, gold, is_right, make_extract, same
from rlalign.testtime.errors import DecodeError

FOUND = [
    ("tag", "<answer>1</answer> no, <answer> 2 </answer>", " 2 "),
    ("tag", "the answer is 2", None),
    ("boxed", r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    ("boxed", r"\boxed{3} and \boxed{4", "3"),
    ("boxed", r"\boxed {7}", "7"),
    ("boxed", "7", None),
    ("json:final answer", '{"thought process": "4", "final answer": "18"}', "18"),
    ("json:final answer", '{"final answer": 18, "x": 1}', "18"),
    ("json:final answer", '{"final answer": "\\sqrt{2}"', "\\sqrt{2}"),
    ("json:final answer", '{"final answer": "a \\"b\\""}', 'a "b"'),
    ("json:a", '{"a": 1} {"a": 2}', "2"),
    ("json:a", '{"b": 1}', None),
    ("number", "75-9=66, 66-5=61", "61"),
    ("number", "it costs $1,234.50.", "1,234.50"),
    ("number", "from -3 to -4.", "-4"),
    ("number", "x2 is 3/4 of it", "3/4"),
    ("number", "1e3", "1e3"),
    ("number", "none at all", None),
    ("line", "a\n b \n\n", "b"),
    ("line", " ", None),
    (r"pattern:x = (\w+)", "x = 1, x = y", "y"),
    ("pattern:a:(b)", "a:b", "b"),
    ("auto", r"\boxed{1} <answer>2</answer>", "2"),
    ("auto", r'{"final answer": 5} \boxed{1}', "1"),
    ("auto", '3 {"final answer": 5} 4', "5"),
    ("auto", "so it is 12\nindeed", "12"),
    ("auto", "so it is\nparis", "paris"),
    ("auto", "", None),
]


@pytest.mark.parametrize(("rule", "text", "found"), FOUND)
def test_a_rule_finds_the_last_answer(rule, text, found):
    assert make_extract(rule)(text) == found


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ("box", DecodeError),
        ("json", DecodeError),
        ("json:", DecodeError),
        ("tag:x", DecodeError),
        ("pattern:", DecodeError),
        ("pattern:(", RewardError),
        ("pattern:x", RewardError),
    ],
)
def test_a_rule_that_is_none_is_refused(rule, error):
    with pytest.raises(error):
        make_extract(rule)


SAME = [
    [
        "1000",
        "1,000",
        "1000.0",
        "$1,000",
        "+1000",
        "1e3",
        "1000.",
        "2000/2",
        " 1000 ",
        r"\$1{,}000",
    ],
    ["18", "18.0", "18.00", "**18**", "$18$", "18%", r"18\%", r"18^\circ", r"\text{18}", "18/1"],
    ["-1/2", "-0.5", "−0.5", r"-\frac{1}{2}", r"-\dfrac12", "-.5", "-5e-1"],
    ["2.5", r"2\frac{1}{2}", "2 1/2", "5/2"],
    ["0", "-0", "0.0", "0/7"],
    ["Paris", "paris", " PARIS\n", r"\text{Paris}"],
    ["x+1", "X+1", r"$x+1$"],
    ["1/0"],
    ["1,00"],
    ["9" * 5000],
    ["1e9999"],
    [""],
]


def test_answers_are_the_same_within_a_class_and_differ_between_classes():
    for i, own in enumerate(SAME):
        for j, others in enumerate(SAME):
            for a in own:
                for b in others:
                    assert same(a, b) == (i == j), (a, b)


@given(st.fractions(max_denominator=10**6))
def test_a_number_has_the_value_that_python_reads(value):
    assert as_number(f"{value.numerator}/{value.denominator}") == value
    assert canonical(str(value.numerator)) == canonical(f"{value.numerator:,}.0")


@given(st.integers(-(10**9), 10**9), st.integers(0, 6))
def test_trailing_zeros_and_decimals_do_not_count(whole, places):
    text = f"{whole / 10**places:.{places}f}"
    assert as_number(text) == as_number(text + ("0" if places else ".0")) == Fraction(text)


@given(st.text(max_size=40))
def test_no_text_breaks_a_rule_or_the_comparison(text):
    assert same(text, text) and same(text, f" **{text}** ")
    for rule in ("auto", "tag", "boxed", "number", "line", "json:a"):
        make_extract(rule)(text)


def test_the_answer_column_as_data_sets_have_it():
    assert gold("5 + 3 = 8 #### 8") == ["8"] and gold(["a", "b"]) == ["a", "b"] and gold(7) == ["7"]
    find = make_extract("number")
    assert is_right("it is 1,200", "... #### 1200", find)
    assert is_right("it is 3", ["2", 3], find) and not is_right("it is 4", ["2", 3], find)
    assert not is_right("no number", "no number", find)
