"""The control: as many rows of forward passes as the search, spent on samples."""

from __future__ import annotations

import pytest
import torch

from rlalign.config.reflect import ReflectConfig
from rlalign.testtime import SampleDrafts, SpanDelete, best_of
from rlalign.testtime.reflect import Reflector
from tests.testtime.worlds import FunctionVerifier, HashModel, RandomVerifier, blank, problem_of

CONFIG = ReflectConfig(steps=3)


@pytest.mark.parametrize(("budget", "rows"), [(0, 1), (3, 1), (5, 1), (6, 2), (31, 10)])
def test_it_makes_as_many_samples_as_the_budget_pays_for(budget, rows):
    verifier = FunctionVerifier(6, lambda row: (sum(row) / 24, [0.0] * 6, 0.0))
    problem = problem_of(blank(6, 4), verifier)
    [result] = best_of(HashModel(), [problem], [budget], config=CONFIG)
    assert result.scorer_calls == rows and result.row_forwards == 3 * rows
    assert len(verifier.seen) == rows
    assert sum(result.ids_T.tolist()) == max(map(sum, verifier.seen))
    assert verifier.seen[0] == result.draft_T.tolist()


def test_its_draft_is_the_greedy_one_and_its_samples_differ():
    verifier = FunctionVerifier(6, lambda row: (0.0, [0.0] * 6, 0.0))
    problem = problem_of(blank(6, 4), verifier)
    [result] = best_of(HashModel(), [problem], [60], config=CONFIG)
    assert len({tuple(row) for row in verifier.seen}) > 5
    options = {"drafts": SampleDrafts(), "config": CONFIG}
    greedy = Reflector(HashModel(), SpanDelete(), **options).run(problem)
    assert torch.equal(greedy.draft_T, result.draft_T)


def test_problems_of_different_budgets_do_not_disturb_each_other():
    verifiers = [RandomVerifier(6, seed, 0.5) for seed in range(4)]
    problems = [problem_of(blank(6, 4), v, name=str(i)) for i, v in enumerate(verifiers)]
    budgets = [3, 12, 30, 7]
    together = best_of(HashModel(), problems, budgets, config=CONFIG)
    for problem, budget, result in zip(problems, budgets, together, strict=True):
        [alone] = best_of(HashModel(), [problem], [budget], config=CONFIG)
        assert torch.equal(alone.ids_T, result.ids_T) and alone.after == result.after


def test_a_canvas_without_a_mask_costs_nothing_whatever_the_budget():
    problem = problem_of(blank(2, 4, {0: 1, 1: 1}), RandomVerifier(2, 0, 0.0))
    [result] = best_of(HashModel(), [problem], [100], config=CONFIG)
    assert result.row_forwards == 0 and result.scorer_calls == 1
