"""Inputs, the definition in float64, and the backend under test.

That is torch on a CPU; Triton where this process interprets it (tests/kernels/test_interpreted.py
starts such a process) and on the GPU that RLALIGN_TEST_DEVICE=cuda asks for.
"""

from __future__ import annotations

import math
import os

import torch

from rlalign.kernels.linear_logprob import linear_logprob

DEVICE = os.environ.get("RLALIGN_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED or DEVICE == "cuda" else "torch"


def score(*args, backend: str = BACKEND, **options):
    return linear_logprob(*args, backend=backend, **options)


def use_tiles(monkeypatch, **sizes):
    """Cut the interpreted kernels otherwise: fields of Tiles; returns what they are now."""
    from rlalign.kernels import tiles

    monkeypatch.setattr(tiles, "INTERPRETER_TILES", tiles.INTERPRETER_TILES._replace(**sizes))
    return tiles.INTERPRETER_TILES


def draw(n: int, d: int, v: int, *, bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0):
    """hidden, weight, bias (or None), target, and signed upstream gradients with zeros: of logp,
    of the entropy, of lse."""
    rng = torch.Generator("cpu").manual_seed(seed)
    options = {"generator": rng, "dtype": torch.float64, "device": "cpu"}
    hidden = torch.randn(n, d, **options)
    weight = torch.randn(v, d, **options) * 2 / math.sqrt(d)
    bias_v = torch.randn(v, **options) if bias else None
    target = torch.randint(0, v, (n,), generator=rng, device="cpu").to(DEVICE)
    upstream = torch.randn(3, n, **options)
    upstream[0, ::3], upstream[1, 1::4], upstream[2, 2::5] = 0, 0, 0  # clipped tokens beside others
    tensors = [None if x is None else x.to(DEVICE, dtype) for x in (hidden, weight, bias_v)]
    inputs = [None if x is None else x.requires_grad_() for x in tensors]
    return *inputs, target, *upstream.to(DEVICE)


def reference(hidden, weight, bias, target, temperature=1.0, softcap=None, logit_scale=1.0):
    """logp, entropy and lse token by token, straight from the definition, in float64."""
    rows = []
    for n in range(len(target)):
        u = weight.double() @ hidden[n].double()
        u = logit_scale * (u if bias is None else u + bias.double())
        z = (u if softcap is None else softcap * torch.tanh(u / softcap)) / temperature
        p = z.exp() / z.exp().sum()
        rows.append((p[target[n]].log(), -(p * p.log()).sum(), z.exp().sum().log()))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def gradients(outputs, upstream, inputs):
    """Of sum(upstream * output) over the outputs that have an upstream."""
    pairs = zip(outputs, upstream, strict=False)
    total = sum((out.double() * up).sum() for out, up in pairs if up is not None)
    return torch.autograd.grad(total, [x for x in inputs if x is not None])


def assert_near(got, want, relative):
    """By norm."""
    error, size = float((got.double() - want.double()).norm()), float(want.double().norm())
    assert error <= relative * size + 1e-12, f"{error / size:.2g} relative"
