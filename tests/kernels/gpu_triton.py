"""What only a GPU shows; run by benchmarks/gpu_suite.sh, and by hand."""

from __future__ import annotations

import pytest
import torch

from rlalign.kernels.arguments import choose_backend
from tests.kernels.cases import assert_near, draw, gradients, score

pytestmark = pytest.mark.gpu


def test_auto_is_triton_on_a_gpu():
    hidden, weight, *_ = draw(4, 64, 99, bias=False, dtype=torch.bfloat16)
    assert choose_backend("auto", hidden, weight) == "triton"
    assert choose_backend("auto", hidden.double(), weight.double()) == "torch"


def test_a_row_does_not_depend_on_the_others_to_the_last_bit():
    hidden, weight, _, target, *_ = draw(900, 128, 50_000, bias=False, dtype=torch.bfloat16)
    options = {"return_entropy": True, "batch_invariant": True}
    whole = score(hidden, weight, target, **options)
    for rows in (slice(0, 1), slice(3, 400), slice(128, 900)):
        part = score(hidden[rows], weight, target[rows], **options)
        assert torch.equal(part.logp, whole.logp[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])


def test_equal_calls_give_equal_bits():
    hidden, weight, _, target, *upstream = draw(700, 256, 30_001, bias=False, dtype=torch.bfloat16)
    results = []
    for _ in range(3):
        out = score(hidden, weight, target, return_entropy=True, workspace_mib=8)
        results.append((out.logp, *gradients(out, upstream[:2], (hidden, weight))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("filtered", [False, True])
def test_the_fused_backward_gives_what_the_workspace_does(filtered):
    """With eps 0 the filtered one reads sorted columns and leaves nothing out."""
    hidden, weight, bias, target, g, *_ = draw(700, 256, 30_001, bias=True, dtype=torch.bfloat16)
    options = {"filter_eps": 0.0, "filter_hidden_grad": True, "filter_weight_grad": True}
    inputs, results = (hidden, weight, bias), []
    for more in ({}, options if filtered else {"backward": "fused"}):
        logp = score(hidden, weight, target, bias=bias, workspace_mib=8, **more).logp
        results.append(gradients([logp], [g], inputs))
    for got, want in zip(*results, strict=True):
        assert_near(got, want, 5e-3)


def test_memory_is_the_gradients_and_the_workspace():
    rows, width, vocab = 4096, 512, 65_536
    hidden, weight, _, target, g, *_ = draw(rows, width, vocab, bias=False, dtype=torch.bfloat16)
    gradients(score(hidden, weight, target), [g], (hidden, weight))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        score(hidden, weight, target, return_entropy=True)
    assert torch.cuda.max_memory_allocated() - before <= 4 << 20
    torch.cuda.reset_peak_memory_stats()
    out = score(hidden, weight, target, return_entropy=True, workspace_mib=64)
    torch.autograd.grad(out.logp, (hidden, weight), g.float())
    grads = 2 * width * (rows + vocab)
    bound = grads + (64 << 20) + 4 * rows * width + (4 << 20)
    assert torch.cuda.max_memory_allocated() - before <= bound


def test_more_than_two_to_the_31_elements_are_addressed():
    """A workspace, and offsets of rows, beyond 32 bits."""
    rows, width, vocab = 140_000, 16, 20_000
    hidden, weight, _, target, g, *_ = draw(rows, width, vocab, bias=False, dtype=torch.bfloat16)
    out = score(hidden, weight, target, workspace_mib=6000)
    d_hidden, _ = gradients(out, [g], (hidden, weight))
    last = slice(rows - 64, rows)
    alone = score(hidden[last], weight, target[last])
    torch.testing.assert_close(out.logp[last], alone.logp, atol=2e-6, rtol=0)
    (d_last,) = torch.autograd.grad((alone.logp.double() * g[last]).sum(), [hidden])
    assert (d_hidden[last] - d_last[last]).norm() <= 5e-3 * d_last[last].norm()
