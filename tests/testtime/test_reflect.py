"""The Reflector: never worse than its draft, within its budget, the same alone and in company."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.config import ConfigError
from rlalign.config.reflect import ReflectConfig
from rlalign.models.masked_diffusion import Canvas
from rlalign.rollout.unmask import UnmaskParams, unmask
from rlalign.testtime import (
    DecodeError,
    GoalDrafts,
    Grammar,
    ManhattanBall,
    Problem,
    Reflector,
    SampleDrafts,
    SpanDelete,
    Stop,
    TopKAlternatives,
    UnitMap,
)
from tests.testtime.worlds import (
    FunctionVerifier,
    GivenDrafts,
    HashModel,
    RandomVerifier,
    RouteModel,
    blank,
    problem_of,
)

DIGITS = [[0], [1], [2], [3]]
PAIRS = [[a, b] for a in range(4) for b in range(4)]


def shift(ids_CT, before_T, unit):
    """Another column moves along, and a given is overwritten: which must not count."""
    ids_CT[:, -1] = (ids_CT[:, 2 * unit] + 1) % 4
    ids_CT[:, 0] = 3
    return ids_CT


NEIGHBOURHOODS = {
    "grammar": (Grammar(PAIRS), 16, 0),
    "ball": (ManhattanBall(4, 2), 13, 0),
    "lattice": (ManhattanBall(4, 4, stride=3), 16 + 13, 0),
    "top-k": (TopKAlternatives(3), 3, 2),
    "delete": (SpanDelete(), 0, 0),
}


@st.composite
def cases(draw):
    """A config, a neighbourhood and its cost, drafts and theirs, a completion, problems."""
    config = ReflectConfig(
        steps=draw(st.integers(1, 3)),
        block_size=draw(st.sampled_from([0, 4])),
        max_iters=draw(st.integers(0, 5)),
        order=draw(st.sampled_from(["earliest", "worst"])),
        objective=draw(st.sampled_from(["lexicographic", "plain"])),
        local_radius=draw(st.integers(0, 2)),
        safe_threshold=draw(st.sampled_from([0.5, 1.0])),
        regen=draw(st.sampled_from(["suffix", "window", "all"])),
        window_radius=draw(st.integers(0, 2)),
        max_anchors=draw(st.integers(0, 2)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        max_rows=draw(st.sampled_from([1, 7, 256])),
    )
    drafts, num, extra = draw(
        st.sampled_from(
            [
                (SampleDrafts(), 1, 0),
                (SampleDrafts(3, 1.0), 3, 0),
                (GoalDrafts(3, min_distance=1.0), 1 + 3, 2),
                (GoalDrafts(2, min_distance=0.0, joint="independent", keep_goal=True), 1 + 2, 1),
            ]
        )
    )
    share = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    nan = draw(st.sampled_from([0.0, 0.5, 1.0]))
    problems = [
        problem_of(
            blank(8, 4, {0: draw(st.integers(0, 3))} | ({6: 1, 7: 2} if i else {})),
            RandomVerifier(4, draw(st.integers(0, 1000)), share, nan),
            2,
            f"p{i}",
        )
        for i in range(draw(st.integers(1, 3)))
    ]
    which = draw(st.sampled_from(sorted(NEIGHBOURHOODS)))
    completion = draw(st.sampled_from(["keep", "model", shift]))
    return config, which, (drafts, num, extra), completion, problems


def facts(result) -> dict:
    out = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    return {name: v.tolist() if torch.is_tensor(v) else v for name, v in out.items()}


@settings(deadline=None, max_examples=150)
@given(cases())
def test_whatever_the_verifier_says_the_promises_hold(case):
    config, which, (drafts, num_drafts, extra), completion, problems = case
    neighbourhood, size, column_passes = NEIGHBOURHOODS[which]
    options = {"drafts": drafts, "completion": completion, "config": config}
    reflector = Reflector(HashModel(seed=config.seed), neighbourhood, **options)
    results = reflector.run_many(problems)
    for problem, result in zip(problems, results, strict=True):
        canvas_T = problem.canvas.ids_BT[0]
        given_T = canvas_T != 4
        for ids_T in (result.ids_T, result.draft_T):
            assert torch.equal(ids_T[given_T], canvas_T[given_T])
            assert not bool((ids_T == 4).any())
        assert result.after.order >= result.before.order
        if not isinstance(drafts, SampleDrafts) or drafts.temperature == 0:
            assert result.alone is not None and result.before.order >= result.alone.order
        verdict = problem.verifier.judge(torch.stack([result.draft_T, result.ids_T]))
        for i, rating in enumerate((result.before, result.after)):
            told = [verdict.hard_B[i], verdict.score_B[i], *verdict.safe_BU[i]]
            seen = [rating.hard, rating.score, *rating.safe]
            if not all(math.isfinite(x) for x in told):
                told = [0.0, -math.inf] + [0.0] * problem.verifier.num_units
            assert seen == pytest.approx([float(x) for x in told])
        if result.before.is_safe:
            assert torch.equal(result.ids_T, result.draft_T) and result.iterations == 0
        assert result.is_safe == (result.stop == Stop.SAFE)
        assert result.iterations == len(result.trace) <= config.max_iters
        if result.stop == Stop.BUDGET:
            assert result.iterations == config.max_iters
        passes = config.steps * (2 if config.block_size else 1)
        per_repair = passes + (column_passes if which == "top-k" else 0)
        per_repair += passes if which == "lattice" and completion == "model" else 0
        wide = 1.5 if which == "top-k" else 2 if which == "ball" else 1  # once in a cycle
        assert result.forwards <= extra + passes + result.iterations * per_repair
        assert result.scorer_calls <= num_drafts + result.iterations * (1 + wide * size)
        assert 0 <= result.bad_scores <= result.scorer_calls


@settings(deadline=None, max_examples=60)
@given(cases())
def test_results_are_the_same_again_and_one_by_one(case):
    config, which, (drafts, _, _), completion, problems = case
    options = {"drafts": drafts, "completion": completion, "config": config}
    model, neighbourhood = HashModel(seed=config.seed), NEIGHBOURHOODS[which][0]
    reflector = Reflector(model, neighbourhood, **options)
    together = [facts(result) for result in reflector.run_many(problems)]
    assert max(model.batches, default=0) <= config.max_rows
    assert together == [facts(reflector.run(problem)) for problem in problems]
    assert together[::-1] == [facts(r) for r in reflector.run_many(problems[::-1])]


def test_problems_share_their_forward_passes():
    model = HashModel()
    reflector = Reflector(model, Grammar(DIGITS), config=ReflectConfig(steps=2, max_iters=4))
    verifiers = [RandomVerifier(6, seed, 0.6) for seed in range(8)]
    problems = [problem_of(blank(6, 4), v, name=str(i)) for i, v in enumerate(verifiers)]
    results = reflector.run_many(problems)
    assert sum(model.batches) == sum(r.row_forwards for r in results)
    # canvases with fewer masks than steps leave a batch earlier, so a few more than the longest
    assert len(model.batches) <= 1.5 * max(r.forwards for r in results)


@pytest.mark.parametrize("regen", ["suffix", "window", "all"])
@pytest.mark.parametrize("seed", range(10))
def test_one_repair_is_what_its_definition_says(regen, seed):
    """Compared with loops over the candidates of the earliest violated unit."""
    model, num = HashModel(seed=seed), 6
    verifier = RandomVerifier(num, seed, 0.6)
    rng = random.Random(seed)
    draft = [rng.randrange(4) for _ in range(num)]
    config = ReflectConfig(steps=2, max_iters=1, regen=regen, local_radius=1)
    problem = problem_of(blank(num, 4, {5: draft[5]}), verifier)
    reflector = Reflector(model, Grammar(DIGITS), drafts=GivenDrafts([draft]), config=config)
    result = reflector.run(problem)
    safe = verifier._row(draft)[1]
    unit = next(u for u in range(num) if safe[u] < 1 and u != 5)
    best = None
    for token in [draft[unit], *(t for t in range(4) if t != draft[unit])]:  # in order of cost
        row = [*draft[:unit], token, *draft[unit + 1 :]]
        score, safe, _ = verifier._row(row)
        value = (min(safe[max(0, unit - 1) : unit + 2]), score)
        if best is None or value > best[0]:
            best = value, token, row
    assert best is not None
    _, token, row = best
    edit = result.trace[0]
    assert (edit.unit, edit.old) == (unit, (draft[unit],))
    if token == draft[unit]:
        assert edit.ids == tuple(draft) and edit.moved is None
        return
    assert edit.moved == tuple(row) and edit.moved_rating is not None
    assert edit.moved_rating.score == pytest.approx(verifier._row(row)[0])
    masked = {
        "suffix": range(unit - 1, num),
        "window": range(unit - 1, unit + 2),
        "all": range(num),
    }
    for column in masked[regen]:
        if 0 <= column < num and column not in (unit, 5):
            row[column] = 4
    filled = unmask(model, Canvas(torch.tensor([row])), UnmaskParams(2), torch.tensor([0]))
    assert edit.new == (token,) and list(edit.ids) == filled.ids_BT[0].tolist()


def test_only_the_least_bad_is_taken_where_no_candidate_is_safe():
    def judge(row):
        return 0.1 * row[1], [{0: 0.0, 1: 0.5, 2: 0.5, 3: 0.2}[row[0]], 1.0], 0.0

    options = {"drafts": GivenDrafts([[0, 1]]), "config": ReflectConfig(max_iters=1)}
    problem = problem_of(blank(2, 4, {1: 1}), FunctionVerifier(2, judge))
    result = Reflector(HashModel(), Grammar(DIGITS), **options).run(problem)
    assert result.trace[0].new == (1,)  # the first of two equally good ones
    assert result.stop == Stop.BUDGET and not result.is_safe


def test_a_unit_that_no_edit_helps_is_passed_over_for_the_next():
    def judge(row):
        return 0.0, [0.0, float(row[1] == 2)], 0.0  # unit 0 is hopeless

    problem = problem_of(blank(2, 4), FunctionVerifier(2, judge))
    config = ReflectConfig(regen="window", window_radius=0)
    options = {"drafts": GivenDrafts([[1, 1]]), "config": config}
    result = Reflector(HashModel(), Grammar(DIGITS), **options).run(problem)
    assert [edit.unit for edit in result.trace] == [0, 1, 0]
    assert result.trace[0].old == result.trace[0].new == (1,)
    assert result.stop == Stop.NO_IMPROVEMENT and result.after.violated == (0,)
    hopeless = problem_of(blank(2, 4, {0: 0}), FunctionVerifier(2, judge))
    result = Reflector(HashModel(), Grammar(DIGITS), **options).run(hopeless)
    assert [edit.unit for edit in result.trace] == [1]  # a given is never searched


def test_a_completion_may_move_all_but_the_candidate_and_the_givens():
    verifier = FunctionVerifier(3, lambda row: (0.0, [1.0, float(row[1] == 2), 1.0], 0.0))
    problem = problem_of(blank(3, 4, {0: 1}), verifier)
    options = {"drafts": GivenDrafts([[1, 0, 0]]), "config": ReflectConfig(max_iters=1)}
    completion = lambda ids, before, unit: torch.full_like(ids, 3)  # noqa: E731
    Reflector(HashModel(), Grammar(DIGITS), completion=completion, **options).run(problem)
    assert verifier.seen[1:5] == [[1, token, 3] for token in range(4)]


def test_the_worst_unit_comes_first_if_so_ordered():
    def judge(row):
        return 0.0, [0.5, 0.75, 0.25, 1.0], 0.0

    problem = problem_of(blank(4, 4), FunctionVerifier(4, judge))
    for order, expected in {"earliest": [0, 1, 2], "worst": [2, 0, 1]}.items():
        options = {"drafts": GivenDrafts([[0, 1, 2, 3]]), "config": ReflectConfig(order=order)}
        result = Reflector(HashModel(), Grammar(DIGITS), **options).run(problem)
        assert [edit.unit for edit in result.trace] == expected
        assert torch.equal(result.ids_T, result.draft_T)  # nothing judged was better
        assert result.stop == Stop.NO_IMPROVEMENT


class Contrary:
    """Of columns 0 and 1, with tokens 0 and 1, it writes into one the opposite of the other."""

    block_size, vocab_size, mask_id = 0, 3, 2

    def logits(self, canvas, start=0, stop=None):
        rows = torch.full((*canvas.ids_BT.shape, 3), -torch.inf)
        for row, (x, y, _) in zip(rows, canvas.ids_BT.tolist(), strict=True):
            for column, other in ((0, y), (1, x)):
                row[column, :2] = torch.tensor([0.0, -9.0] if other == 1 else [-9.0, 0.0])
        return rows[:, start:stop]


class Watched(Grammar):
    """Notes how far it was told to look."""

    reached: list[float] = []  # noqa: RUF012

    def propose(self, session, place):
        self.reached.append(place.reach)
        return super().propose(session, place)


def test_sequences_that_come_back_widen_the_search_and_then_end_it():
    """A unit is fine as 0; the model makes the other one 1 unless an anchor holds it. The third one
    is given and never fine."""

    def judge(row):
        return -sum(row), [1.0 - row[0], 1.0 - row[1], 0.0], 0.0

    problem = problem_of(blank(3, 2, {2: 0}), FunctionVerifier(3, judge))
    shared = {"drafts": GivenDrafts([[1, 0, 0]])}
    config = ReflectConfig(regen="all", max_anchors=1)
    Watched.reached.clear()
    result = Reflector(Contrary(), Watched([[0], [1]]), config=config, **shared).run(problem)
    assert [edit.ids for edit in result.trace] == [(0, 1, 0), (1, 0, 0), (0, 1, 0)]
    assert result.stop == Stop.CYCLE and Watched.reached == [1.0, 1.0, 1.5]
    assert result.ids_T.tolist() == [0, 0, 0]  # a candidate, which was judged like the rest
    assert result.trace[0].moved == (0, 0, 0) and result.trace[0].moved_rating == result.after
    config = ReflectConfig(regen="all")
    result = Reflector(Contrary(), Grammar([[0], [1]]), config=config, **shared).run(problem)
    assert [edit.ids for edit in result.trace] == [(0, 1, 0), (0, 0, 0)]
    assert result.stop == Stop.NO_IMPROVEMENT


def test_a_result_is_never_below_what_the_model_writes_alone():
    """Of goals each is worse than the greedy sequence, which is worth 1; its rating is kept."""
    greedy = Reflector(HashModel(), SpanDelete()).run(
        problem_of(blank(4, 4), RandomVerifier(4, 0, 1.0))
    )
    wanted = greedy.draft_T.tolist()
    verifier = FunctionVerifier(4, lambda row: (float(row == wanted), [0.0] * 4, 0.0))
    config = ReflectConfig(max_iters=0)
    for with_greedy in (True, False):
        drafts = GoalDrafts(3, 3, min_distance=0.0, with_greedy=with_greedy)
        reflector = Reflector(HashModel(), SpanDelete(), drafts=drafts, config=config)
        result = reflector.run(problem_of(blank(4, 4), verifier))
        assert result.scorer_calls == 3 + with_greedy
        if with_greedy:
            assert result.ids_T.tolist() == wanted and result.alone == result.before
            assert result.before.score == 1
        else:
            assert result.alone is None


def test_of_drafts_that_are_all_worth_nothing_the_one_that_fails_last_is_taken():
    def judge(row):
        return 0.0, [float(token == 0) for token in row], 0.0

    rows = [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 2]]
    problem = problem_of(blank(3, 4), FunctionVerifier(3, judge))
    config = ReflectConfig(max_iters=0)
    for logp, expected in (([-1, -1, -2, -1], 3), ([0, 0, -1, -1], 2)):
        drafts = GivenDrafts(rows, [float(x) for x in logp])
        result = Reflector(HashModel(), SpanDelete(), drafts=drafts, config=config).run(problem)
        assert result.draft_T.tolist() == result.ids_T.tolist() == rows[expected]


def test_a_hard_term_comes_before_safety_and_safety_before_the_score():
    values = {0: (0.9, 0.0, 0.0), 1: (0.1, 0.0, 1.0), 2: (0.8, 0.5, 1.0), 3: (0.3, 1.0, 1.0)}

    def judge(row):
        score, safe, hard = values[row[0]]
        return score, [safe], hard

    problem = problem_of(blank(1, 4), FunctionVerifier(1, judge))
    config = ReflectConfig(max_iters=0)
    for rows, expected in (([0, 1], 1), ([2, 1], 2), ([2, 3], 3)):
        drafts = GivenDrafts([[row] for row in rows])
        result = Reflector(HashModel(), SpanDelete(), drafts=drafts, config=config).run(problem)
        assert result.ids_T.tolist() == [expected]


def test_a_canvas_without_a_mask_costs_nothing():
    model = HashModel()
    problem = problem_of(blank(2, 4, {0: 1, 1: 1}), RandomVerifier(2, 0, 0.0))
    result = Reflector(model, Grammar(DIGITS)).run(problem)
    assert result.forwards == result.row_forwards == 0 and not model.batches
    assert result.stop == Stop.NO_IMPROVEMENT and result.ids_T.tolist() == [1, 1]


def test_a_goal_that_is_kept_is_no_longer_written_anew():
    def judge(row):
        return 0.0, [float(row[0] == 3), 1.0, 1.0], 0.0

    problem = problem_of(blank(3, 4), FunctionVerifier(3, judge))
    config = ReflectConfig(regen="all", max_iters=1)
    kept = {}
    for goal in (None, 2):
        drafts = GivenDrafts([[0, 0, token] for token in range(4)], goal=goal)
        runs = []
        for token in range(4):
            drafts = GivenDrafts([[0, 0, token]], goal=goal)
            reflector = Reflector(HashModel(), Grammar(DIGITS), drafts=drafts, config=config)
            runs.append(reflector.run(problem).trace[0].ids[2])
        kept[goal] = runs
    assert kept[2] == [0, 1, 2, 3] and len(set(kept[None])) == 1


class Backwardless(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        raise AssertionError("a gradient was asked for")


class Parametric(torch.nn.Module):
    """A model with parameters whose backward pass fails."""

    block_size, vocab_size, mask_id = 0, 5, 4

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 5)

    def logits(self, canvas, start=0, stop=None):
        mixed = self.table(canvas.ids_BT).cumsum(1) + self.table(canvas.ids_BT)
        out = Backwardless.apply(mixed).clone()
        out[..., 4] = -torch.inf
        return out[:, start:stop]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_no_gradient_is_ever_needed(mode):
    torch.manual_seed(0)
    model = Parametric()
    before = model.table.weight.clone()
    for neighbourhood in (Grammar(DIGITS), TopKAlternatives(2)):
        with mode():
            options = {"completion": "model", "config": ReflectConfig(max_iters=4)}
            problem = problem_of(blank(6, 4), RandomVerifier(6, 1, 0.3))
            result = Reflector(model, neighbourhood, **options).run(problem)
        assert result.iterations > 0 and not result.ids_T.requires_grad
        assert model.table.weight.grad is None and torch.equal(model.table.weight, before)


def planted(seed: int) -> tuple[Problem, list[int]]:
    """A plan of 8 points that follows a route, one of them moved off it; a point is fine within 3
    of the route, and nothing is worth anything while one is not."""
    rng = random.Random(seed)
    x, y = 25.0, 35.0
    route = []
    for _ in range(8):
        x, y = x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)
        route += [x, y]
    plan = [round(value) for value in route]
    plan[2 * rng.randrange(8) + rng.randrange(2)] += rng.choice([-8, 8])

    def judge(row):
        gaps = [math.dist(row[i : i + 2], route[i : i + 2]) for i in range(0, 16, 2)]
        hard = float(max(gaps) <= 3)
        return hard * (1 - sum(gaps) / 24), [float(gap <= 3) for gap in gaps], hard

    canvas = Canvas(
        torch.full((1, 16), 61), cond={"route": torch.tensor([route], dtype=torch.float64)}
    )
    return Problem(canvas, FunctionVerifier(8, judge), UnitMap.even(8, 2), str(seed)), plan


@pytest.mark.parametrize("completion", ["keep", "model"])
def test_a_planted_fault_is_repaired_within_three_iterations(completion):
    config = ReflectConfig(steps=5, max_iters=3)
    solved = 0
    for seed in range(20):
        problem, plan = planted(seed)
        result = Reflector(
            RouteModel(),
            ManhattanBall(61, 10, stride=3),
            drafts=GivenDrafts([plan]),
            completion=completion,
            config=config,
        ).run(problem)
        assert result.before.hard == 0
        solved += result.after.hard == 1
    assert solved >= 16
    problems = [planted(seed)[0] for seed in range(4)]
    reflector = Reflector(RouteModel(), ManhattanBall(61, 10), config=config)
    assert all(result.is_safe for result in reflector.run_many(problems))  # each its own route


def test_parts_that_do_not_fit_are_refused_with_the_cause():
    model, verifier = HashModel(), RandomVerifier(2, 0, 1.0)
    run = Reflector(model, Grammar(DIGITS)).run
    with pytest.raises(DecodeError, match="judges 2 units, the unit map has 3"):
        run(Problem(blank(3, 4), verifier, UnitMap.even(3)))
    with pytest.raises(DecodeError, match="disjoint columns of 0 to 1"):
        run(Problem(blank(2, 4), verifier, UnitMap.even(2, start=1)))
    with pytest.raises(DecodeError, match="disjoint"):
        run(Problem(blank(2, 4), verifier, UnitMap(((0,), (0,)))))
    with pytest.raises(DecodeError, match="1 row is wanted, not 2"):
        run(Problem(Canvas(torch.full((2, 2), 4)), verifier, UnitMap.even(2)))
    with pytest.raises(DecodeError, match="safe_BU has shape"):
        run(problem_of(blank(2, 4), FunctionVerifier(2, lambda row: (0.0, [1.0], 0.0))))
    with pytest.raises(DecodeError, match="choose keep, model"):
        Reflector(model, Grammar(DIGITS), completion="kept")
    with pytest.raises(DecodeError, match="a sequence for each"):
        options = {"completion": lambda ids, before, unit: ids[:1]}
        unsafe = RandomVerifier(2, 0, 0.0)
        Reflector(model, Grammar(DIGITS), **options).run(problem_of(blank(2, 4), unsafe))
    with pytest.raises(ConfigError, match="steps"):
        Reflector(model, Grammar(DIGITS), config=ReflectConfig(steps=0))
