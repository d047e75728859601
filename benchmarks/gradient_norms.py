"""Norms of per-sample gradients (rlalign/trainer/gradient_norms.py) against a forward pass, and
against what they replace: one backward pass per sample through the model's own logits.

Two random Qwen2: of the shape of the mini models, and a middling one whose head is 40 % of the
work. Groups of eight samples, completions of 15 to 45 and of 40 to 160 tokens. Times are medians of
interleaved turns after a warm-up, each turn's `/ forward` against the forward pass with log-probs
beside it; errors are the largest of a row, against the loop.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlalign.models.random import init_model, small_config
from rlalign.trainer.policy import Policy
from rlalign.types import TrainBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE = 0.8
SAMPLES = 8  # of a prompt
LIMIT = 1.3  # the bar
FORWARD, HEAD, EMBEDDING = "forward, log-probs", "norms, lm_head", "norms, embed_tokens"
LOOPS = {HEAD: "loop, lm_head", EMBEDDING: "loop, embed_tokens"}


class Case(NamedTuple):
    name: str
    shape: dict[str, Any]
    prompts: int
    prompt_tokens: tuple[int, int]
    completion_tokens: tuple[int, int]


CASES = (
    Case(
        "mini",
        dict(vocab=55, hidden=128, layers=3, heads=4, kv_heads=2, mlp=384, tied=True),
        prompts=8, prompt_tokens=(8, 16), completion_tokens=(15, 45),
    ),
    Case(
        "middling",
        dict(vocab=32768, hidden=512, layers=8, heads=8, kv_heads=4, mlp=1536, tied=False),
        prompts=4, prompt_tokens=(40, 80), completion_tokens=(40, 160),
    ),
)  # fmt: skip


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows, bars = [], []
    for case in CASES:
        found = measure(case, turns=5 if quick else 15, loop_turns=1 if quick else 3)
        rows += found
        ratio = next(row["/ forward"] for row in found if row["side"] == HEAD)
        what = f"{case.name}: forward and norms (lm_head) / forward"
        bars.append({"what": what, "value": ratio, "bar": f"<= {LIMIT}", "holds": ratio <= LIMIT})
    return {"name": "gradient_norms", "machine": _machine(), "rows": rows, "bars": bars}


def measure(case: Case, turns: int, loop_turns: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    config = small_config(
        "qwen2", max_positions=512, eos_token_id=1, pad_token_id=None, **case.shape
    )
    policy = Policy(init_model(config, seed=0).to(DEVICE)).train()
    batch = draw(case).to(DEVICE)
    sides: dict[str, Callable[[], Any]] = {
        FORWARD: lambda: policy(batch, TEMPERATURE),
        HEAD: lambda: policy(batch, TEMPERATURE, grad_params="lm_head").norm_B,
        EMBEDDING: lambda: policy(batch, TEMPERATURE, grad_params="embed_tokens").norm_B,
    }
    loops = {
        LOOPS[HEAD]: lambda: loop(policy, batch, policy.head.weight, output_side=True),
        LOOPS[EMBEDDING]: lambda: loop(policy, batch, policy.model.get_input_embeddings().weight),
    }
    expected = {side: loops[name]() for side, name in LOOPS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*sides, *loops)}
    with torch.no_grad():
        values = {name: call() for name, call in sides.items()}
        for turn in range(turns):
            for name, call in sides.items():
                seconds[name].append(_seconds(call))
            for name, call in loops.items() if turn < loop_turns else ():
                seconds[name].append(_seconds(call))
    rows = []
    for name, times in seconds.items():
        row = {
            "model": case.name,
            "side": name,
            "median ms": 1e3 * statistics.median(times),
            "spread ms": f"{1e3 * min(times):.1f} to {1e3 * max(times):.1f}",
            "/ forward": statistics.median(
                a / b for a, b in zip(times, seconds[FORWARD], strict=False)
            ),
        }
        if name in expected:
            row["error"] = float((values[name] / expected[name] - 1).abs().max())
        rows.append(row)
    return rows


def draw(case: Case) -> TrainBatch:
    rng = random.Random(0)

    def tokens(bounds: tuple[int, int]) -> tuple[int, ...]:
        return tuple(rng.randrange(case.shape["vocab"]) for _ in range(rng.randint(*bounds)))

    prompts = [tokens(case.prompt_tokens) for _ in range(case.prompts)]
    group = [i for i in range(case.prompts) for _ in range(SAMPLES)]
    rows = [(i, tokens(case.completion_tokens)) for i in group]
    length_B = torch.tensor([len(completion) for _, completion in rows])
    mask_BT = (torch.arange(int(length_B.max())) < length_B[:, None]).float()
    return TrainBatch(
        sequences=tuple(prompts[i] + completion for i, completion in rows),
        completion_len_B=length_B,
        group_id_B=torch.tensor(group),
        mask_BT=mask_BT,
        reward_B=torch.zeros(len(rows)),
        logp_rollout_BT=torch.zeros_like(mask_BT),
    )


@torch.enable_grad()
def loop(policy: Policy, batch: TrainBatch, weight: Tensor, output_side: bool = False) -> Tensor:
    """[B] by a forward and a backward pass each, through the model's own modules."""
    norms = []
    for sequence, length in zip(batch.sequences, batch.completion_len_B.tolist(), strict=True):
        ids = torch.tensor([sequence], device=weight.device)
        hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        hidden = hidden.detach() if output_side else hidden
        logits = policy.model.get_output_embeddings()(hidden[-length - 1 : -1]).float()
        logp = (logits / TEMPERATURE).log_softmax(-1).gather(1, ids[0, -length:, None])
        (grad,) = torch.autograd.grad(logp.sum(), weight)
        # summed in float32 the squares of a large matrix are off by 1e-3 on a CPU
        norms.append(torch.linalg.vector_norm(grad, dtype=torch.float64))
    return torch.stack(norms)


def _seconds(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _machine() -> str:
    if DEVICE == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}"
