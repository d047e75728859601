"""Forward and backward of rows that begin alike: what they have in common run once
(rlalign/trainer/rows.py), their prompt alone once, and every row by itself.

Trees of 16 rows as a branching rollout leaves them: a prompt of 16 tokens, four times two branches,
of 32 tokens each and of 54 at the end, so that exactly half of all tokens are those of another row.
A random Qwen2 of the shape of the mini models and one four times as wide. Packing is on everywhere:
no padding goes through a linear layer. Times are medians of turns in which the sides alternate,
after a warm-up; `/ alone` is taken turn by turn. The error is that of the gradient against rows
that run alone, |difference| / |gradient|.
"""

from __future__ import annotations

import dataclasses
import platform
import random
import statistics
import time
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from rlalign.models.random import init_model, small_config
from rlalign.trainer import policy as policy_module
from rlalign.trainer.batch import bare_batch
from rlalign.trainer.policy import Policy
from rlalign.trainer.rows import RowPlan, plan_rows, prompt_keys
from rlalign.types import TrainBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, SEGMENTS, BRANCHES = 16, (32, 32, 32, 54), 2
FASTER = 1.5  # the bar
ALONE, PROMPTS, BEGINNINGS = "each row alone", "prompts once", "all beginnings once"


class Case(NamedTuple):
    name: str
    trees: int
    shape: dict[str, Any]


CASES = (
    Case("mini", 4, dict(vocab=55, hidden=128, layers=3, heads=4, kv_heads=2, mlp=384)),
    Case("wide", 1, dict(vocab=4096, hidden=512, layers=4, heads=8, kv_heads=4, mlp=1536)),
)


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows, bars = [], []
    for case in CASES:
        found = measure(case, turns=3 if quick else 7)
        rows += found
        faster = 1 / next(row["/ alone"] for row in found if row["side"] == BEGINNINGS)
        what = f"{case.name}: {ALONE} / {BEGINNINGS}"
        bars.append(
            {"what": what, "value": faster, "bar": f">= {FASTER}", "holds": faster >= FASTER}
        )
    return {"name": "prefix", "machine": _machine(), "rows": rows, "bars": bars}


def measure(case: Case, turns: int) -> list[dict[str, Any]]:
    config = small_config(
        "qwen2", max_positions=512, tied=True, eos_token_id=1, pad_token_id=None, **case.shape
    )
    policy = Policy(init_model(config, seed=0).to(DEVICE)).train()
    batch = draw(case).to(DEVICE)
    weight_BT = torch.randn(batch.mask_BT.shape, device=DEVICE) / batch.mask_BT.sum()
    plans = {ALONE: alone, PROMPTS: prompts_once, BEGINNINGS: plan_rows}
    seconds: dict[str, list[float]] = {side: [] for side in plans}
    gradients: dict[str, Tensor] = {}
    for turn in range(turns + 1):  # the first warms up
        for side, plan in plans.items():
            policy.zero_grad()
            _wait()
            start = time.perf_counter()
            with patch.object(policy_module, "plan_rows", plan):
                output = policy(batch, 0.9, entropy=True)
            (weight_BT * output.logp_BT).sum().backward()
            _wait()
            if turn:
                seconds[side].append(time.perf_counter() - start)
            gradients[side] = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return [
        {
            "model": case.name,
            "side": side,
            "tokens": sum(map(len, plans[side](batch, share_prefixes=True).sequences)),
            "median ms": 1e3 * statistics.median(times),
            "spread ms": f"{1e3 * min(times):.1f} to {1e3 * max(times):.1f}",
            "/ alone": statistics.median(a / b for a, b in zip(times, seconds[ALONE], strict=True)),
            "error": float((gradients[side] - gradients[ALONE]).norm() / gradients[ALONE].norm()),
        }
        for side, times in seconds.items()
    ]


def alone(batch: TrainBatch, *, share_prefixes: bool) -> RowPlan:
    return plan_rows(batch, share_prefixes=False)


def prompts_once(batch: TrainBatch, *, share_prefixes: bool) -> RowPlan:
    """Each row continues its prompt in the first row that has it. Paths are whole rows, so the
    places on them stay."""
    plan = plan_rows(batch, share_prefixes=False)
    sequences, parents, holder = [], [], {}
    for i, (key, row) in enumerate(zip(prompt_keys(batch), plan.sequences, strict=True)):
        first = holder.setdefault(key, i)
        sequences.append(row if first == i else row[PROMPT:])
        parents.append(None if first == i else (first, PROMPT))
    return dataclasses.replace(plan, sequences=sequences, parents=parents)


def draw(case: Case) -> TrainBatch:
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(case.shape["vocab"]) for _ in range(count))

    rows = []
    for _ in range(case.trees):
        leaves = [tokens(PROMPT)]
        for length in SEGMENTS:
            leaves = [path + tokens(length) for path in leaves for _ in range(BRANCHES)]
        rng.shuffle(leaves)
        rows += leaves
    return bare_batch(rows, [sum(SEGMENTS)] * len(rows))


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _machine() -> str:
    if DEVICE == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}"
