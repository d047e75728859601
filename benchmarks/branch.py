"""BranchGRPO on digits against flat GRPO: network calls, time, reward, gradient variance.

Every side is the same trainer with another configuration, from the same pre-trained model: flat
GRPO (16 images a prompt from one noise, every step trains: DanceGRPO), the full tree, the tree with
a sliding window of five depths left out, and Mix (only a window of four steps and the splits are
stochastic and train). Ten prompts a step, 16 images each. Held out: the classifier's probability of
the prompted digit for 100 deterministic images a digit, every two steps; the judge is another
model that no reward has seen.

Times are those of rollouts, rewards and updates, without evaluations; sides take turns step by
step, so a busy machine slows them alike. `time to flat's reward` is the time until a side's
held-out reward reaches that of flat at its last step, against the time flat takes to its last step.
The gradient's noise is that of independent batches at the first policy, along the direction u in
which the sides of seed 0 moved in the end: Var(g u) / E(g u)^2. (Over all parameters it drowns: a
batch's |E g|^2 is a few thousandths of its variance.)
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import rlalign
from rlalign.algos.tree_pruning import edge_weights
from rlalign.trainer.flow_job import FlowJob, open_flow_job, roll_out
from rlalign.trainer.flow_loop import evaluate_flow, flow_step
from rlalign.trainer.flow_update import accumulate, flow_credit

ROOT = Path(__file__).resolve().parent.parent
FLAT, TREE, PRUNED, MIX = "flat GRPO", "tree", "tree, depths pruned", "Mix"
WINDOW = "{size: 5, start: 15, direction: earlier, interval: 30, stop: 10}"
SIDES = {
    FLAT: [
        "algo.loss_type=dance_grpo",
        "rollout.flow.split_steps=[]",
        "rollout.flow.roots_per_prompt=16",
        "rollout.flow.shared_start=true",
        "rollout.flow.mix.window_size=0",
    ],
    TREE: ["rollout.flow.mix.window_size=0"],
    PRUNED: ["rollout.flow.mix.window_size=0", f"algo.tree.depth_prune={WINDOW}"],
    MIX: [],
}
REWARD_BARS = {MIX: 0.95, PRUNED: 0.95, FLAT: 0.90}
TIME_BARS = {PRUNED: 0.5, MIX: 0.3}
CALL_BARS = {TREE: (12.69, 12.69), PRUNED: (12.69, 7.69), MIX: (12.69, 1.19)}  # a leaf
EVAL_EVERY = 2


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    seeds, steps = (range(1), 20) if quick else (range(3), 60)
    curves: dict[str, list[Curve]] = {side: [] for side in SIDES}
    moved: list[torch.Tensor] = []
    for seed in seeds:
        found, moves = race(seed, steps)
        moved = moved or moves
        for side, curve in found.items():
            curves[side].append(curve)
            print(f"seed {seed} {side}: {curve}", flush=True)
    direction = torch.stack([move / move.norm() for move in moved]).mean(0)
    noise = {side: gradient_noise(side, 8 if quick else 128, direction) for side in SIDES}
    batching = frontier_batching(turns=1 if quick else 3)
    rows = [row(side, curves[side], curves[FLAT], noise[side]) for side in SIDES]
    rows.append({"side": "node at a time / level at a time", "rollout": batching})
    return {
        "name": "branch",
        "machine": _machine(),
        "rows": rows,
        "bars": bars(curves, batching, full=not quick),
    }


@dataclasses.dataclass
class Curve:
    """One run: held-out figures by step, and the seconds and calls of each step."""

    reward: dict[int, float] = dataclasses.field(default_factory=dict)
    judge: dict[int, float] = dataclasses.field(default_factory=dict)
    diversity: dict[int, float] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)
    rollout_calls: list[float] = dataclasses.field(default_factory=list)
    train_calls: list[float] = dataclasses.field(default_factory=list)

    def time_to(self, reward: float) -> float | None:
        """Seconds until the held-out reward is first reached, between evaluations on a line."""
        before = (0, self.reward[0])
        for step, value in sorted(self.reward.items())[1:]:
            if value >= reward:
                part = (reward - before[1]) / max(value - before[1], 1e-9)
                at = before[0] + min(max(part, 0.0), 1.0) * (step - before[0])
                whole = int(at)
                rest = (at - whole) * (self.seconds[whole] if whole < len(self.seconds) else 0.0)
                return sum(self.seconds[:whole]) + rest
            before = (step, value)
        return None

    def __str__(self) -> str:
        last = max(self.reward)
        return (
            f"{self.reward[0]:.3f} -> {self.reward[last]:.3f} (judge {self.judge[last]:.3f}, "
            f"diversity {self.diversity[last]:.3f}) in {sum(self.seconds):.1f} s"
        )


def race(seed: int, steps: int) -> tuple[dict[str, Curve], list[torch.Tensor]]:
    """All sides from the same start, a step of each in turn; and how far each has moved."""
    curves = {side: Curve() for side in SIDES}
    with ExitStack() as stack:
        jobs = {side: stack.enter_context(open_side(side, seed, steps)) for side in SIDES}
        start = {side: weights(job) for side, job in jobs.items()}
        for side, job in jobs.items():
            judge(job, curves[side], 0)
        for step in range(1, steps + 1):
            for side, job in jobs.items():
                began = time.perf_counter()
                figures = flow_step(job).figures
                curves[side].seconds.append(time.perf_counter() - began)
                job.progress.step += 1
                curves[side].rollout_calls.append(figures["tree/calls_per_leaf/rollout"])
                curves[side].train_calls.append(figures["tree/calls_per_leaf/train"])
                if step % EVAL_EVERY == 0:
                    judge(job, curves[side], step)
        return curves, [weights(job) - start[side] for side, job in jobs.items()]


def weights(job: FlowJob) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in job.policy.parameters()])


def judge(job: FlowJob, curve: Curve, step: int) -> None:
    figures = evaluate_flow(job)
    curve.reward[step] = figures["rewards/digits_class_probability"]
    curve.judge[step] = figures["rewards/digits_judge"]
    curve.diversity[step] = figures["diversity"]


def open_side(side: str, seed: int, steps: int) -> Any:
    folder = tempfile.mkdtemp(prefix="rlalign-branch-")
    config = rlalign.load_config(
        ROOT / "configs/branch_grpo/mini.yaml",
        [
            f"seed={seed}",
            f"trainer.max_steps={steps}",
            "trainer.num_threads=1",
            f"tracking.runs_dir={folder}",
            "rewards.functions=[{name: digits_class_probability}, {name: digits_judge, weight: 0}]",
            *(["algo.epsilon=0.2"] if side == FLAT else []),
            *SIDES[side],
        ],
    )
    return open_flow_job(config)


def gradient_noise(side: str, repeats: int, direction: torch.Tensor) -> float:
    """Var(g u) / E(g u)^2 over batches of fresh noise, the same prompts, the first policy."""
    with open_side(side, 0, 1) as job:
        along = torch.stack([gradient @ direction for gradient in draw_gradients(job, repeats)])
    return float(along.var() / along.mean() ** 2)


def draw_gradients(job: FlowJob, repeats: int) -> Iterator[torch.Tensor]:
    parameters = list(job.policy.parameters())
    for repeat in range(repeats):
        batch = roll_out(job, 1000 + repeat).batch
        credit = flow_credit(batch, job.config, 0)
        weight_N = edge_weights(
            batch.tree, credit.keep_N, job.config.algo, torch.ones(len(batch.tree))
        )
        accumulate(
            job.engine,
            batch,
            credit.advantage_N,
            weight_N,
            credit.keep_N,
            job.config,
            job.world,
            [],
        )
        yield torch.cat([torch.nan_to_num(p.grad.flatten()) for p in parameters])
        for parameter in parameters:
            parameter.grad = None


def frontier_batching(turns: int) -> float:
    """Seconds of a rollout one node at a time over those of a level at a time: the median."""
    ratios = []
    with open_side(TREE, 0, 1) as whole, open_side(TREE, 0, 1) as single:
        single.config.rollout.flow.micro_batch_rows = 1
        for turn in range(turns):
            seconds = [roll_out(job, turn).rollout_s for job in (whole, single)]
            ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def row(side: str, curves: Sequence[Curve], flat: Sequence[Curve], noise: float) -> dict[str, Any]:
    last = max(curves[0].reward)
    ends = [curve.reward[last] for curve in curves]
    return {
        "side": side,
        "reward": f"{statistics.mean(c.reward[0] for c in curves):.3f} -> {_interval(ends)}",
        "half-way": _interval(
            [curve.reward[last // 2 // EVAL_EVERY * EVAL_EVERY] for curve in curves]
        ),
        "judge": _interval([curve.judge[last] for curve in curves]),
        "diversity": _interval([curve.diversity[last] for curve in curves]),
        "rollout": statistics.mean(x for c in curves for x in c.rollout_calls),
        "training": statistics.mean(x for c in curves for x in c.train_calls),
        "s a step": statistics.median(x for c in curves for x in c.seconds),
        "time to flat's reward": _text(time_ratio(curves, flat)),
        "reward at flat's time / 3": _interval(
            [reward_at(c, sum(f.seconds) / 3) for c, f in zip(curves, flat, strict=True)]
        ),
        "gradient noise": noise,
    }


def time_ratio(curves: Sequence[Curve], flat: Sequence[Curve]) -> float | None:
    """Median over the seeds of the time to flat's last reward, over flat's own time."""
    ratios = []
    for curve, other in zip(curves, flat, strict=True):
        found = curve.time_to(other.reward[max(other.reward)])
        ratios.append(float("inf") if found is None else found / sum(other.seconds))
    return statistics.median(ratios)


def reward_at(curve: Curve, seconds: float) -> float:
    """The last held-out reward within `seconds`: equal cost."""
    spent, reached = 0.0, curve.reward[0]
    for step, taken in enumerate(curve.seconds, start=1):
        spent += taken
        if spent > seconds:
            break
        reached = curve.reward.get(step, reached)
    return reached


def bars(curves: dict[str, list[Curve]], batching: float, *, full: bool) -> list[dict[str, Any]]:
    found = []

    def add(what: str, value: float, bar: float, *, least: bool = False) -> None:
        holds = value >= bar if least else value <= bar
        sign = ">=" if least else "<="
        found.append({"what": what, "value": value, "bar": f"{sign} {bar}", "holds": holds})

    for side, (rollout, training) in CALL_BARS.items():
        first = curves[side][0]
        add(f"{side}: rollout calls a leaf", first.rollout_calls[0], rollout)
        add(f"{side}: training calls a leaf", first.train_calls[0], training)
    add("node at a time / level at a time", batching, 3.0, least=True)
    if full:
        for side, bar in REWARD_BARS.items():
            last = max(curves[side][0].reward)
            worst = min(curve.reward[last] for curve in curves[side])
            add(f"{side}: p(digit) after {last} steps, worst seed", worst, bar, least=True)
        for side, bar in TIME_BARS.items():
            add(f"{side}: time to flat's reward", time_ratio(curves[side], curves[FLAT]), bar)
    return found


def _interval(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _text(value: float | None) -> str:
    return "never" if value is None or value == float("inf") else f"{value:.2f}"


def _machine() -> str:
    return f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread"
