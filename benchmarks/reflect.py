"""Reflective decoding with and without each part: plans of ToyDrive, and 4x4 Sudoku.

Driving: 200 held-out scenes, one planner. Reflection knows the others' futures as they will be (gt)
or at constant velocity (cv); every figure is taken with the real ones. Failures are plans that hit
something or leave the road. The last two columns of scores are seen by no scorer: the distance to
the expert's plan, and to the nearest lane's centre. `best of n` spends as many rows of forward
passes on independent samples, chosen by the same oracle. Intervals: paired bootstrap over scenes.
A search is never below the planner in its oracle's order, which says nothing of how many scenes are
`worse than the planner alone` by the real futures.

Sudoku: 300 puzzles of grids that the model has not seen; the control spends the same forwards.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rlalign.tasks.driving import Scorer, expert_distance, lane_distance, track
from rlalign.testtime import best_of
from rlalign.testtime.domain import Item
from rlalign.testtime.reflect import ReflectResult
from rlalign.testtime.reflect_driving import DrivingDomain
from rlalign.testtime.reflect_sudoku import SudokuDomain

FAILURES, SUDOKU = 0.6, 0.9  # bars
# Oracle, drafts, and repairs at most.
SIDES = {
    "planner": ("cv", 1, 0),
    "+ goals": ("cv", 3, 0),
    "+ repairs": ("cv", 1, 10),
    "reflection, cv": ("cv", 3, 10),
    "reflection, gt": ("gt", 3, 10),
}
PLANNER, FULL, CONTROL = "planner", "reflection, cv", "best of n, cv"
PUZZLES = ((12, 1), (12, 2), (12, 4), (10, 2))  # blanks, steps


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows, bars = driving(40 if quick else 200)
    more, checks = sudoku(60 if quick else 300)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return {"name": "reflect", "machine": machine, "rows": rows + more, "bars": bars + checks}


def driving(num: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    scores: dict[str, np.ndarray] = {}
    rows = []
    used: list[int] = []
    for side, (oracle, drafts, repairs) in SIDES.items():
        domain = DrivingDomain(
            [f"max_iters={repairs}"], None, oracle=oracle, drafts=drafts, size="full"
        )
        items = [domain.make(i) for i in range(num)]
        results, ms = _timed(lambda item, d=domain: d.reflector.run(item.problem), items)
        rows.append(_row(side, domain, items, results, ms, scores))
        if side == FULL:
            used = [result.row_forwards for result in results]
    domain = DrivingDomain([], None, oracle="cv", drafts=1, size="full")
    items = [domain.make(i) for i in range(num)]
    spent = dict(zip([item.problem.id for item in items], used, strict=True))

    def control(item: Item) -> ReflectResult:
        return best_of(domain.planner, [item.problem], [spent[item.problem.id]])[0]

    results, ms = _timed(control, items)
    rows.append(_row(CONTROL, domain, items, results, ms, scores))
    rows.insert(0, _expert(domain, items))
    by_side = {row["side"]: row for row in rows}
    cut = 1 - by_side[FULL]["failures %"] / by_side[PLANNER]["failures %"]
    return rows, [
        _bar("driving: failures that reflection (cv) removes", cut, FAILURES),
        _bar("driving: PDMS gained (cv), low end of the interval", by_side[FULL]["low"], 0.0),
    ]


def _timed(
    decode: Callable[[Item], ReflectResult], items: Sequence[Item]
) -> tuple[list[ReflectResult], float]:
    """Results one by one, and the median milliseconds of one."""
    results, times = [], []
    for item in items:
        began = time.perf_counter()
        results.append(decode(item))
        times.append(1e3 * (time.perf_counter() - began))
    return results, statistics.median(times)


def _row(
    side: str,
    domain: DrivingDomain,
    items: Sequence[Item],
    results: Sequence[ReflectResult],
    ms: float,
    scores: dict[str, np.ndarray],
) -> dict[str, Any]:
    plans = [domain.codebook.decode(result.ids_T) for result in results]
    figures = _figures([item.source for item in items], plans)
    scores[side] = figures.pop("pdms")
    low, high = _interval(scores[side] - scores[PLANNER])
    row = {
        "part": "driving", "side": side, **figures, "low": low, "high": high,
        "worse than the planner alone %": worse_share(scores[side], scores[PLANNER]),
        "repairs": statistics.mean(result.iterations for result in results),
        "repairs at most": max(result.iterations for result in results),
        "forwards": statistics.mean(result.forwards for result in results),
        "judged": statistics.mean(result.scorer_calls for result in results),
        "ms a scene": ms,
    }  # fmt: skip
    print(row, file=sys.stderr, flush=True)
    return row


def _expert(domain: DrivingDomain, items: Sequence[Item]) -> dict[str, Any]:
    """What the words of the planner allow at best."""
    code, scenes = domain.codebook, [item.source for item in items]
    plans = [code.decode(code.encode(scene.expert_N2)) for scene in scenes]
    figures = _figures(scenes, plans)
    figures.pop("pdms")
    return {"part": "driving", "side": "expert, in tokens", **figures}


def _figures(scenes: Sequence[Any], plans: Sequence[np.ndarray]) -> dict[str, Any]:
    """Means over scenes, in per cent, with the real futures."""
    found: dict[str, list[float]] = {}
    for scene, plan in zip(scenes, plans, strict=True):
        states = track(plan[None], scene.speed)
        score = Scorer(scene, "gt").score(states)
        values = {
            "failures %": 100.0 * float(score.hard_K[0] < 1),
            "NC": 100 * float(score.nc_K[0]), "DAC": 100 * float(score.dac_K[0]),
            "TTC": 100 * float(score.ttc_K[0]), "C": 100 * float(score.comfort_K[0]),
            "EP": 100 * float(score.progress_K[0]), "PDMS": 100 * float(score.pdms_K[0]),
            "to expert, m": float(expert_distance(states, scene)[0]),
            "to lane, m": float(lane_distance(states, scene)[0]),
        }  # fmt: skip
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    means = {name: statistics.mean(values) for name, values in found.items()}
    return {**means, "pdms": np.array(found["PDMS"])}


def worse_share(score_N: np.ndarray, planner_N: np.ndarray) -> float:
    """Per cent of the scenes whose score is below the planner's; rounding does not count."""
    return 100.0 * float((score_N < planner_N - 1e-9).mean())


def _interval(difference_N: np.ndarray) -> tuple[float, float]:
    """95 % of the mean, by 10,000 resamplings of the scenes."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(difference_N), (10_000, len(difference_N)))
    low, high = np.quantile(difference_N[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def sudoku(num: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, bars = [], []
    for blanks, steps in PUZZLES:
        domain = SudokuDomain([f"steps={steps}"], None, blanks=blanks, drafts=1)
        items = [domain.make(i) for i in range(num)]
        results, ms = _timed(lambda item, d=domain: d.reflector.run(item.problem), items)
        problems, spent = [item.problem for item in items], [r.row_forwards for r in results]
        config, model = domain.reflector.config, domain.reflector.model
        control = best_of(model, problems, spent, config=config)
        solved = statistics.mean(result.after.is_safe for result in results)
        rows.append({
            "part": "sudoku", "side": f"{blanks} blanks, {steps} steps",
            "draft": statistics.mean(result.before.is_safe for result in results),
            "reflected": solved,
            "best of n": statistics.mean(result.after.is_safe for result in control),
            "worse than the draft": sum(r.after.order < r.before.order for r in results),
            "repairs": statistics.mean(result.iterations for result in results),
            "rows of forwards": statistics.mean(spent), "ms a puzzle": ms,
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
        if (blanks, steps) == (12, 2):
            bars.append(_bar("sudoku: solved, 12 blanks in 2 steps", solved, SUDOKU))
    return rows, bars


def _bar(what: str, value: float, bar: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": f">= {bar}", "holds": value >= bar}
