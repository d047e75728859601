"""The control of a search: as much of the model's time spent on independent samples."""

from __future__ import annotations

from collections.abc import Sequence

from rlalign.config.reflect import ReflectConfig
from rlalign.models.masked_diffusion import MaskedModel
from rlalign.testtime.drafts import STEP
from rlalign.testtime.problem import Problem, check_problem
from rlalign.testtime.rating import Judge
from rlalign.testtime.reflect import ReflectResult, Stop
from rlalign.testtime.session import Search, Session, run_searches


def best_of(
    model: MaskedModel,
    problems: Sequence[Problem],
    num_forwards: Sequence[int],
    *,
    temperature: float = 1.0,
    config: ReflectConfig | None = None,
) -> list[ReflectResult]:
    """The best of the greedy sequence and of samples, as many as `num_forwards` rows of forward
    passes allow for each problem (`ReflectResult.row_forwards` of the search it is compared with).

    The greedy sequence is always made, and is the draft of the result.
    """
    config = config or ReflectConfig()
    for problem in problems:
        check_problem(problem)
    pairs = zip(problems, num_forwards, strict=True)
    searches = [_search(model, problem, num, temperature, config) for problem, num in pairs]
    return run_searches(model, searches, config.max_rows)


def _search(
    model: MaskedModel, problem: Problem, num_forwards: int, temperature: float, cfg: ReflectConfig
) -> Search[ReflectResult]:
    session, judge = Session(problem, model.mask_id, cfg), Judge(problem, cfg.safe_threshold)
    blank_BT = problem.canvas.ids_BT
    greedy = yield from session.fill(blank_BT, STEP)
    before = judge(greedy.ids_BT)[0]
    cost = session.row_forwards
    num = (num_forwards - cost) // cost if cost else 0
    if num > 0:
        rows_BT = blank_BT.repeat(num, 1)
        samples = yield from session.fill(rows_BT, STEP, temperature, first=1)
        judge(samples.ids_BT)
    return ReflectResult(
        ids_T=judge.best_T,
        draft_T=greedy.ids_BT[0],
        before=before,
        alone=before,
        after=judge.best,
        stop=Stop.SAFE if judge.best.is_safe else Stop.BUDGET,
        iterations=0,
        forwards=session.forwards,
        row_forwards=session.row_forwards,
        scorer_calls=judge.calls,
        bad_scores=judge.bad,
        trace=(),
    )
