"""Reflective decoding: a masked-diffusion model's sequence, repaired where a verifier finds fault.

    draft      the best of a few first sequences
    repeat     judge; stop if no unit is violated
               t* = the earliest violated unit; judge candidate edits of it, the others completed
               in a cheap way
               anchor = the best by (safety around t*, score, -cost)
               fix the anchor, mask what surrounds it, let the model fill that in
    result     the best of all that was judged (rating.py)

ReflectDrive (arXiv 2509.20109, section 3.3 and equation 4) does this for the waypoints of a plan;
here it is for any masked-diffusion model and verifier. No gradient is taken, no weight changes.
Where the paper leaves a choice open, `ReflectConfig` has it.

Legend: T columns, U units, C candidates, L columns of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from rlalign.config.load import check_values
from rlalign.config.reflect import ReflectConfig
from rlalign.models.masked_diffusion import MaskedModel
from rlalign.testtime.drafts import Drafts, SampleDrafts
from rlalign.testtime.neighbourhoods import Neighbourhood, check_tokens
from rlalign.testtime.problem import Problem, check_problem
from rlalign.testtime.rating import Judge, Rating
from rlalign.testtime.repair import Completion, Edit, Repairs, check_completion
from rlalign.testtime.session import Search, Session, run_searches


class Stop(StrEnum):
    """Why a search ended."""

    SAFE = "safe"  # no unit is violated
    BUDGET = "budget"  # max_iters repairs were tried
    CYCLE = "cycle"  # sequences come back, in spite of a wider search and a dropped anchor
    NO_IMPROVEMENT = "no_improvement"  # no violated unit has an edit that changes anything


@dataclass(frozen=True, slots=True, eq=False)
class ReflectResult:
    """The best sequence that was judged, and how it was found.

    `before` is of the draft that was chosen; `alone` of what the model writes greedily by itself,
    where that was among the drafts.
    `forwards` are those one after another, `row_forwards` counts the rows of each; `scorer_calls`
    counts judged sequences, `bad_scores` those among them that could not be judged or got a number
    that is not finite.
    """

    ids_T: Tensor  # int64
    draft_T: Tensor  # int64
    before: Rating
    alone: Rating | None
    after: Rating
    stop: Stop
    iterations: int
    forwards: int
    row_forwards: int
    scorer_calls: int
    bad_scores: int
    trace: tuple[Edit, ...]

    @property
    def is_safe(self) -> bool:
        return self.after.is_safe


class Reflector:
    """Repairs sequences of `model`. The default draft is the greedy sequence.

    `completion` says what a candidate edit is judged with: `keep`, all other tokens as they are;
    `model`, the rest written anew by the model for each candidate; or a function (ids_CT, before_T,
    unit) -> ids_CT of the domain, which moves what should move along.

    Cost, S being `steps` and N the neighbourhood: at most S forwards for drafts (and 1 or 2 for
    goals), and S a repair, with `TopKAlternatives` one more a column; as many judged sequences as
    there are drafts (one more than goals), and N + 1 a repair. `block_size` > 0 makes S that of all
    blocks.
    """

    def __init__(
        self,
        model: MaskedModel,
        neighbourhood: Neighbourhood,
        *,
        drafts: Drafts | None = None,
        completion: str | Completion = "keep",
        config: ReflectConfig | None = None,
    ) -> None:
        """Raises ConfigError for an option out of range, DecodeError for an unknown completion and
        for a neighbourhood with a token that the model does not have."""
        self.config = config or ReflectConfig()
        check_values(self.config)
        check_completion(completion)
        check_tokens(neighbourhood, model)
        self.model, self.drafts = model, drafts or SampleDrafts()
        self.neighbourhood, self.completion = neighbourhood, completion

    def run(self, problem: Problem) -> ReflectResult:
        """Raises DecodeError for a problem whose parts do not fit, and what the verifier raises."""
        return self.run_many([problem])[0]

    def run_many(self, problems: Sequence[Problem]) -> list[ReflectResult]:
        """The results of `run`, in common forward passes."""
        for problem in problems:
            check_problem(problem)
        searches = [self._search(problem) for problem in problems]
        return run_searches(self.model, searches, self.config.max_rows)

    def _search(self, problem: Problem) -> Search[ReflectResult]:
        session = Session(problem, self.model.mask_id, self.config)
        judge = Judge(problem, self.config.safe_threshold)
        draft_T, before, alone, goal = yield from choose_draft(self.drafts, session, judge)
        state = Repairs(session, judge, self.neighbourhood, self.completion, draft_T, before)
        if goal is not None:
            state.anchor(goal, draft_T)
        trace: list[Edit] = []
        while (stop := _stop(judge, state, len(trace), self.config.max_iters)) is None:
            trace.append((yield from state.repair(len(trace) + 1)))
        return ReflectResult(
            ids_T=judge.best_T,
            draft_T=draft_T,
            before=before,
            alone=alone,
            after=judge.best,
            stop=stop,
            iterations=len(trace),
            forwards=session.forwards,
            row_forwards=session.row_forwards,
            scorer_calls=judge.calls,
            bad_scores=judge.bad,
            trace=tuple(trace),
        )


def choose_draft(
    drafts: Drafts, session: Session, judge: Judge
) -> Search[tuple[Tensor, Rating, Rating | None, int | None]]:
    """The best draft, int64 [T], its rating, that of the greedy sequence, and the unit to be kept;
    of equally good ones the likeliest, of those the first."""
    drafted = yield from drafts.draft(session)
    ratings = judge(drafted.ids_KT)
    logp = drafted.logp_K.tolist()

    def value(index: int) -> tuple[object, ...]:
        return ratings[index].order, logp[index], -index

    index = max(range(len(ratings)), key=value)
    draft_T, rating = drafted.ids_KT[index], ratings[index]
    judge.best_T, judge.best = draft_T, rating  # of several equally good ones, this one
    alone = None if drafted.alone is None else ratings[drafted.alone]
    return draft_T, rating, alone, None if index == drafted.alone else drafted.goal


def _stop(judge: Judge, state: Repairs, iterations: int, max_iters: int) -> Stop | None:
    if judge.best.is_safe:
        return Stop.SAFE
    if state.cycles:
        return Stop.CYCLE
    if state.next_unit() is None:
        return Stop.NO_IMPROVEMENT
    return Stop.BUDGET if iterations == max_iters else None
