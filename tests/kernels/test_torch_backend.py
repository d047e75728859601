"""What holds for one backend only: plain torch in tiles, any dtype, little memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rlalign.kernels import torch_backend
from rlalign.kernels.linear_logprob import linear_logprob
from tests.kernels.cases import draw, gradients
from tests.kernels.watch import Watch


def test_gradcheck_in_float64():
    hidden, weight, bias, target, _, _, _ = draw(5, 4, 11, bias=True)
    for softcap in (None, 3.0):
        assert torch.autograd.gradcheck(
            lambda h, w, b, cap=softcap: linear_logprob(
                h, w, target, bias=b, softcap=cap, temperature=0.7, return_entropy=True,
                chunk_size=2, return_lse=True,
            ),
            (hidden, weight, bias),
        )  # fmt: skip


@pytest.mark.parametrize("entropy", [False, True])
def test_the_tiles_do_not_change_anything(entropy, monkeypatch):
    hidden, weight, _, target, g, _, _ = draw(50, 16, 101, bias=False, dtype=torch.float32)
    results = []
    for chunk, side in ((1, 1), (7, 10), (50, 33), (None, 8), (None, 1024)):
        monkeypatch.setitem(torch_backend.TILE_SIDE, "cpu", side)
        out = linear_logprob(hidden, weight, target, chunk_size=chunk, return_entropy=entropy)
        grads = gradients(out[:1], (g,), (hidden, weight))
        results.append((out.logp.detach(), *grads))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_half_precision_head_is_read_in_slices(monkeypatch):
    hidden, weight, _, target, g, e, _ = draw(12, 8, 50, bias=False, dtype=torch.bfloat16)
    whole = linear_logprob(hidden, weight, target, return_entropy=True)
    whole_grads = gradients(whole, (g, e), (hidden, weight))
    monkeypatch.setitem(torch_backend.TILE_SIDE, "cpu", 5)
    monkeypatch.setattr(torch_backend, "SLICE_BYTES", 7 * 8 * 4)
    parts = linear_logprob(hidden, weight, target, return_entropy=True)
    torch.testing.assert_close(parts.logp, whole.logp, atol=1e-6, rtol=0)
    for got, want in zip(gradients(parts, (g, e), (hidden, weight)), whole_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_times_vocabulary_exists(dtype, monkeypatch):
    """The largest tensor in forward and backward is a tile of logits, or the head's gradient; of a
    half-precision head there is no whole copy."""
    n, d, v, side = 600, 4, 3000, 32
    sizes = {}
    hidden, weight, _, target, g, e, _ = draw(n, d, v, bias=False, dtype=dtype)
    monkeypatch.setitem(torch_backend.TILE_SIDE, "cpu", side)
    monkeypatch.setattr(torch_backend, "SLICE_BYTES", 0)
    with Watch(lambda x: sizes.update({x.dtype: max(x.numel(), sizes.get(x.dtype, 0))})):
        out = linear_logprob(hidden, weight, target, return_entropy=True)
        gradients(out, (g, e), (hidden, weight))
    assert sizes[dtype] == d * v
    assert sizes[torch.float32] <= (d * v if dtype == torch.float32 else n * d)
    assert n * d < d * v and side**2 < d * v


PEAK = """
import resource, torch
from rlalign.kernels.linear_logprob import linear_logprob
torch.set_num_threads(1)
hidden = torch.randn(4096, 256, requires_grad=True)
weight = torch.randn(32000, 256, requires_grad=True)
target = torch.randint(0, 32000, (4096,))
def step(n):
    out = linear_logprob(hidden[:n], weight, target[:n], return_entropy=True)
    torch.autograd.grad(out.logp.sum() + out.entropy.sum(), [hidden, weight])
torch.mm(hidden, hidden.T[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_stays_below_the_bound():
    """The head's gradient and its inputs' pages, a few tiles of logits, plus 25 %; eager: 125 MiB
    several times."""
    run = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, timeout=120)
    tile, head = 4 * 1024**2, 32000 * 256 * 4
    assert int(run.stdout) * 1024 <= 1.25 * (4 * tile + head)
