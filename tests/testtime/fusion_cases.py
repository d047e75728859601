"""Models for tests of logit fusion, and the method from its definition: whole forward passes, dense
softmaxes, float64, one prompt at a time."""

from __future__ import annotations

import random

import torch

from rlalign.models.random import init_model, small_config
from rlalign.models.tokenizer import build_tokenizer
from rlalign.models.warm_start import warm_start
from rlalign.tasks.mini import MiniModel, MiniTask, WarmStart
from rlalign.testtime.fusion_models import Member

TOKENIZER = build_tokenizer(64)
GRID = [round(0.1 * i, 10) for i in range(21)]
PROMPTS = ["abc", "a longer one", "xy", "12+3=?", "z"]


def random_member(seed, *, vocab=None, tokenizer=TOKENIZER, architecture="qwen2", **shape):
    shape = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 64} | shape
    config = small_config(
        architecture, vocab=vocab or len(tokenizer), max_positions=64, tied=True, init_std=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shape,
    )  # fmt: skip
    return Member(init_model(config, seed).eval(), tokenizer)


@torch.no_grad()
def next_logits(member, ids):
    return member.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def greedy(member, prompt, count):
    """The likeliest tokens of one model, eos included."""
    ids = list(TOKENIZER(prompt)["input_ids"])
    start = len(ids)
    while len(ids) < start + count and ids[-1] != TOKENIZER.eos_token_id:
        ids.append(int(next_logits(member, ids).argmax()))
    return tuple(ids[start:])


def strength(large, small, expert, grid):
    """The first minimiser of L, by its definition."""
    m, s, e = (x.log_softmax(-1) for x in (large, small, expert))
    best, chosen = float("inf"), 0.0
    for alpha in grid:
        p = (m + alpha * (e - s)).log_softmax(-1)
        forward = (p.exp() * (p - m)).sum() - (e.exp() * (e - s)).sum()
        backward = (m.exp() * (m - p)).sum() - (s.exp() * (s - e)).sum()
        loss = float(forward**2 + backward**2)
        if loss < best:
            best, chosen = loss, alpha
    return chosen


def by_definition(large, small, expert, prompt, count, grid=GRID):
    """(tokens, strengths) of one expert at temperature 0."""
    ids = list(TOKENIZER(prompt)["input_ids"])
    start, alphas = len(ids), []
    while len(ids) < start + count and ids[-1] != TOKENIZER.eos_token_id:
        m, s, e = (next_logits(member, ids) for member in (large, small, expert))
        alphas.append(strength(m, s, e, grid))
        ids.append(int((m + alphas[-1] * (e - s)).argmax()))
    return tuple(ids[start:]), alphas


def fused_probability(large, small, expert, ids, grid, *, top_p=1.0):
    """What the next token is drawn from at temperature 1, float64 [V]."""
    m, s, e = (next_logits(member, ids) for member in (large, small, expert))
    p = (m + strength(m, s, e, grid) * (e - s)).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept, total = [], 0.0
    while total < top_p and len(kept) < len(order):
        kept.append(order[len(kept)])
        total += float(p[kept[-1]])
    inside = torch.zeros_like(p)
    inside[kept] = p[kept]
    return inside / inside.sum()


def strides(*sizes):
    """ "ce=": five letters, from the sum of the two on by a stride that only the writer knows."""

    def demonstrations(seed):
        rng = random.Random(f"{sizes}/{seed}")
        while True:
            size, i, j = rng.choice(sizes), rng.randrange(10), rng.randrange(10)
            letters = ("abcdefghij"[(i + j + size * n) % 10] for n in range(1, 6))
            yield "abcdefghij"[i] + "abcdefghij"[j] + "=", "".join(letters)

    return demonstrations


def trained(seed, hidden, *, expert):
    """A model that writes with any stride; an expert goes on with stride 1."""
    phases = [WarmStart("any", 150, 6e-3, 1e-2, strides(1, 2, 3))]
    if expert:
        phases.append(WarmStart("one", 25, 3e-3, 5e-3, strides(1)))
    recipe = MiniModel(
        tuple(phases), hidden=hidden, layers=2, mlp=2 * hidden, max_positions=64, batch_size=24
    )
    task = MiniTask("strides", lambda *_: [], lambda *_: False, recipe)
    return Member(warm_start(task, seed, TOKENIZER), TOKENIZER)
