"""Inputs, the definition in float64, and the backend under test: torch, or Triton where this
process interprets it (tests/kernels/test_interpreted.py starts such a process)."""

from __future__ import annotations

import math
import os

import torch

from rlalign.kernels.linear_logprob import linear_logprob

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"


def score(*args, backend: str = BACKEND, **options):
    return linear_logprob(*args, backend=backend, **options)


def draw(n: int, d: int, v: int, *, bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0):
    """hidden, weight, bias (or None), target, and signed upstream gradients with zeros: of logp,
    of the entropy, of lse."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng, dtype=torch.float64)
    weight = torch.randn(v, d, generator=rng, dtype=torch.float64) * 2 / math.sqrt(d)
    bias_v = torch.randn(v, generator=rng, dtype=torch.float64) if bias else None
    target = torch.randint(0, v, (n,), generator=rng)
    g, e, ell = torch.randn(3, n, generator=rng, dtype=torch.float64)
    g[::3], e[1::4], ell[2::5] = 0, 0, 0  # clipped tokens beside tokens of either sign
    tensors = [None if x is None else x.to(dtype) for x in (hidden, weight, bias_v)]
    return *[None if x is None else x.requires_grad_() for x in tensors], target, g, e, ell


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
