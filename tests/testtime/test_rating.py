"""What a verdict is worth, also a broken one."""

from __future__ import annotations

import dataclasses
import math

import pytest

from rlalign.config.reflect import ReflectConfig
from rlalign.testtime import DecodeError, Grammar, Reflector, SpanDelete, best_of
from tests.testtime.worlds import (
    FunctionVerifier,
    GivenDrafts,
    HashModel,
    RandomVerifier,
    blank,
    problem_of,
)

DIGITS = [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    "bad", [(math.nan, 1.0, 1.0), (9.0, math.nan, 1.0), (9.0, 1.0, math.inf), (math.inf, 1.0, 1.0)]
)
def test_a_verdict_with_a_number_that_is_none_is_the_worst_there_is(bad):
    """Below a negative score that nothing speaks for."""

    def judge(row):
        score, safe, hard = (-3.0, 0.0, -1.0) if row[0] == 0 else bad
        return score, [safe, 1.0], hard

    problem = problem_of(blank(2, 4), FunctionVerifier(2, judge))
    config = ReflectConfig(max_iters=0)
    for rows, num in (([[1, 0], [0, 0], [2, 0]], 2), ([[0, 0], [1, 0]], 1)):
        drafts = GivenDrafts(rows)
        result = Reflector(HashModel(), SpanDelete(), drafts=drafts, config=config).run(problem)
        assert result.bad_scores == num and result.ids_T.tolist() == [0, 0]
        assert result.after.score == -3 and result.after.safe == (0.0, 1.0)
    drafts = GivenDrafts([[1, 0]])
    result = Reflector(HashModel(), SpanDelete(), drafts=drafts, config=config).run(problem)
    assert not result.is_safe and result.after.violated == (0, 1) and result.after.hard == 0
    assert result.ids_T.tolist() == [1, 0] and result.after.score == -math.inf
    [control] = best_of(HashModel(), [problem_of(blank(2, 4), AllBad())], [20])
    assert not bool((control.ids_T == 4).any())


class AllBad(FunctionVerifier):
    def __init__(self):
        super().__init__(2, lambda row: (math.nan, [1.0, 1.0], 1.0))


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ((0.0, [1.5], 1.0), r"safe_BU outside \[0, 1\]"),
        ((math.nan, [-0.5], 1.0), r"safe_BU outside \[0, 1\]"),
        ((0.0, [1.0], 2.0), "hard_B above 1"),
    ],
)
def test_a_verdict_out_of_range_ends_the_search_with_its_name(verdict, message):
    problem = problem_of(blank(1, 4), FunctionVerifier(1, lambda row: verdict), name="mine")
    with pytest.raises(DecodeError, match=f"'mine'.*{message}"):
        Reflector(HashModel(), SpanDelete()).run(problem)


def test_a_verifier_gets_a_copy_and_must_give_tensors():
    class Writing(RandomVerifier):
        def judge(self, ids_BT):
            verdict = super().judge(ids_BT)
            ids_BT.fill_(4)
            return verdict

    class Lists(RandomVerifier):
        def judge(self, ids_BT):
            return dataclasses.replace(super().judge(ids_BT), hard_B=[1.0] * len(ids_BT))

    config = ReflectConfig(max_iters=2)
    results = [
        Reflector(HashModel(), Grammar(DIGITS), config=config).run(
            problem_of(blank(3, 4), verifier)
        )
        for verifier in (RandomVerifier(3, 1, 0.3), Writing(3, 1, 0.3))
    ]
    assert results[0].after == results[1].after and results[0].trace == results[1].trace
    with pytest.raises(DecodeError, match="hard_B is list, not a tensor"):
        Reflector(HashModel(), SpanDelete()).run(problem_of(blank(3, 4), Lists(3, 1, 0.3)))
