"""What both sides of `train` are given: the task, the model, and how fast the machine is.

The model is a small random Qwen2 whose weights decide how long completions are, so that neither
side needs an option for it. Three channels of the residual stream are set apart: ONE is a constant,
FLAG marks the first token of the prompt, and MEAN is the average of FLAG over the n tokens so far
(one attention head attends to all of them alike), proportional to 1 / n. The log-odds of the end
token are a linear function of ONE and MEAN:

    natural:  log-odds(n) = c0 + c1 / n, which makes lengths spread over about 8 to 128 tokens
    equal:    log-odds = -40, so that every completion reaches the limit

Shapes: V vocabulary, D hidden size, T positions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.models.random import write_random_model

ONE, MEAN, FLAG = 0, 1, 2
MARK = "#"  # every prompt begins with it
# (completion token, probability that it is the last) through which the hazard passes
HAZARD = ((6, 0.002), (128, 0.03))
NEVER = -40.0  # log-odds


@dataclass(frozen=True)
class TrainSpec:
    """One setting of the comparison.

    >>> TrainSpec(lengths="equal", max_completion_length=64)
    """

    lengths: str = "equal"  # or "natural"
    num_prompts: int = 8  # per step
    group_size: int = 8
    max_completion_length: int = 64
    steps: int = 6  # timed optimizer steps, one rollout batch each
    warmup_steps: int = 1  # before them, not timed
    hidden: int = 256
    layers: int = 3
    mlp: int = 832
    learning_rate: float = 1e-6
    num_threads: int = 1
    seed: int = 0

    def prompts(self) -> list[str]:
        """`num_prompts` for every step, 9 to 17 tokens each."""
        draw = random.Random(self.seed)
        count = self.num_prompts * (self.steps + self.warmup_steps)
        return [
            MARK + "".join(draw.choices("0123456789+-=?", k=draw.randint(8, 16)))
            for _ in range(count)
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> TrainSpec:
        return TrainSpec(**json.loads(text))


def write_model(spec: TrainSpec, path: Path) -> Path:
    """The HF folder of the model, 2.6M parameters at the default size, and its tokenizer."""
    write_random_model(
        path, "qwen2", hidden=spec.hidden, layers=spec.layers, mlp=spec.mlp, init_std=0.02,
        seed=spec.seed,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    [mark] = tokenizer(MARK)["input_ids"]
    with torch.no_grad():
        _set_channels_apart(model, mark)
        _set_hazard(model, mark, tokenizer.eos_token_id, spec)
    model.save_pretrained(path)
    return path


def _set_channels_apart(model: Any, mark: int) -> None:
    channels = [ONE, MEAN, FLAG]
    embedding_VD = model.model.embed_tokens.weight
    embedding_VD[:, channels] = 0
    embedding_VD[:, ONE] = 0.1
    embedding_VD[mark, FLAG] = 0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[channels] = 0
        layer.mlp.down_proj.weight[channels] = 0
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight[: attention.head_dim] = 0  # all scores equal
    attention.q_proj.bias[: attention.head_dim] = 0
    attention.v_proj.weight[0] = 0
    attention.v_proj.bias[0] = 0
    attention.v_proj.weight[0, FLAG] = 1
    attention.o_proj.weight[MEAN, 0] = 0.02


def _set_hazard(model: Any, mark: int, eos: int, spec: TrainSpec) -> None:
    """Choose the end token's embedding for the wanted log-odds, from two measured positions."""
    end_VD = model.model.embed_tokens.weight
    end_VD[eos] = 0
    prompt = statistics.mean(map(len, spec.prompts()))
    generator = torch.Generator().manual_seed(spec.seed)
    ids_BT = torch.randint(6, len(end_VD), (16, 200), generator=generator)
    ids_BT[:, 0] = mark
    hidden_BTD = model.model(ids_BT).last_hidden_state
    logits_BTV = hidden_BTD @ end_VD.T
    logits_BTV[..., eos] = -torch.inf
    rest_T = logits_BTV.logsumexp(-1).mean(0)
    rows, wanted = [], []
    for token, probability in HAZARD:
        at = round(prompt) + token - 2
        odds = NEVER if spec.lengths == "equal" else math.log(probability / (1 - probability))
        rows.append(hidden_BTD[:, at, [ONE, MEAN]].mean(0))
        wanted.append(rest_T[at] + odds)
    end_VD[eos, [ONE, MEAN]] = torch.linalg.solve(torch.stack(rows), torch.stack(wanted))


def matmul_flops_per_s(num_threads: int, size: int = 1024, repeats: int = 9) -> float:
    """The machine's float32 matrix product rate: the median of some products of `size`."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * size**3 / statistics.median(seconds[1:])


def step_flops(spec: TrainSpec, prompt_tokens: float, completion_tokens: float) -> float:
    """Multiplications and additions that one step cannot do without: 2 a parameter and token to
    read each prompt once and sample each completion token, 6 to train on every completion token
    and, once a group, on every prompt token; attention scores are left out."""
    d = spec.hidden
    per_layer = 2 * d * d + 2 * d * (d // 2) + 3 * d * spec.mlp  # 4 heads, 2 of keys and values
    body, head = spec.layers * per_layer, 262 * d
    return (2 + 6) * (body * (prompt_tokens + completion_tokens) + head * completion_tokens)


def peak_rss_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
