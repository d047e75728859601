import time

import pytest

from rlalign.config.schema import RewardSpec
from tests.rewards.rows import groups

CASES = [
    ("so 72", "72", 1.0),
    ("it is \\boxed{72}", "48 + 24 = 72\n#### 72", 1.0),
    ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
    ("$\\frac{2}{4}$", "1/2", 1.0),
    ("<answer>(1, 2)</answer>", "(1,2)", 1.0),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
    ("\\boxed{1,000}", 1000, 1.0),
    ("\\boxed{71}", "72", 0.0),
    ("I do not know", "72", 0.0),
    ("", "72", 0.0),
    ("\\boxed{\\frac{1}{0}}", "72", 0.0),
    ("\\boxed{72}", None, None),
]


def test_answers_are_compared_as_mathematics_and_hangs_end_at_their_deadline(scorer):
    """One scorer for all: importing sympy is what costs time here."""
    hanging = ["\\boxed{10^{10^{8}}}", "\\boxed{100000000!}"]
    one = scorer(RewardSpec(name="math", params={"timeout_s": 2.0, "num_workers": 1}))
    rows = [(text, answer) for text, answer, _ in CASES]
    rows += [(text, "3") for text in hanging] + [("\\boxed{5}", "5"), ("\\boxed{5}", "")]
    start = time.monotonic()
    scores = one.score(groups(*(("q", answer, [text]) for text, answer in rows)))
    assert time.monotonic() - start < 20
    values = scores.by_function["math"]
    expected = [score for _, _, score in CASES]
    assert values[: len(CASES)].nan_to_num(-1).tolist() == [
        -1 if s is None else s for s in expected
    ]
    assert scores.errors == {"timeout": len(hanging), "invalid": 1}
    assert values[len(CASES) :].isnan().tolist() == [True] * len(hanging) + [False, True]


@pytest.mark.parametrize("value", [0, -1.0])
def test_the_row_deadline_must_be_positive(scorer, value):
    with pytest.raises(Exception, match="timeout_s"):
        scorer(RewardSpec(name="math", params={"timeout_s": value}))
