"""Searches side by side: what is drawn is keyed by the problem, and any mixture shares a driver."""

from __future__ import annotations

import dataclasses

import torch

from rlalign.config.reflect import ReflectConfig
from rlalign.models.masked_diffusion import Canvas
from rlalign.testtime import Grammar, Problem, Reflector, SampleDrafts, UnitMap
from tests.testtime.worlds import HashModel, RandomVerifier, blank, problem_of

DIGITS = [[0], [1], [2], [3]]


def test_samples_are_keyed_by_the_problem_s_id_and_the_seed():
    verifier = RandomVerifier(8, 0, 0.0)

    def draft(name: str, seed: int = 0) -> list[int]:
        config = ReflectConfig(steps=2, max_iters=0, seed=seed)
        options = {"drafts": SampleDrafts(1, 1.0), "config": config}
        problem = problem_of(blank(8, 4), verifier, name=name)
        return Reflector(HashModel(), Grammar(DIGITS), **options).run(problem).draft_T.tolist()

    assert draft("a") == draft("a")
    assert len({tuple(draft(name, seed)) for name in "abc" for seed in (0, 1)}) > 4


def test_problems_of_different_lengths_and_paddings_go_together():
    reflector = Reflector(HashModel(), Grammar(DIGITS), config=ReflectConfig(steps=2, max_iters=3))
    problems = [
        problem_of(blank(num, 4), RandomVerifier(num, num, 0.5), name=str(num)) for num in (4, 6, 5)
    ]
    real_BT = torch.tensor([[False, True, True, True]])
    padded = Canvas(torch.tensor([[4, 4, 4, 4]]), real_BT)
    units = UnitMap.even(3, start=1)
    problems.append(Problem(padded, RandomVerifier(3, 9, 0.5), units, "padded"))
    together = reflector.run_many(problems)
    for problem, result in zip(problems, together, strict=True):
        alone = reflector.run(problem)
        assert torch.equal(alone.ids_T, result.ids_T)
        assert dataclasses.astuple(alone.after) == dataclasses.astuple(result.after)
    assert together[3].ids_T[0] == 4  # padding is nobody's to fill
