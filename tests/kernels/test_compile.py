"""torch.compile sees two operators: no graph break, the same numbers."""

from __future__ import annotations

import torch

from rlalign.kernels import op
from rlalign.kernels.linear_logprob import linear_logprob
from tests.kernels.cases import draw, gradients


def test_a_loss_on_top_compiles_without_a_graph_break():
    hidden, weight, bias, target, *_ = draw(20, 8, 50, bias=True, dtype=torch.float32)

    def loss(hidden, weight, bias):
        out = linear_logprob(
            torch.tanh(hidden), weight, target, bias=bias, return_entropy=True, backend="torch"
        )
        assert out.entropy is not None
        return (out.logp.exp() * out.logp).sum() - 0.1 * out.entropy.mean()

    inputs = (hidden, weight, bias)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    pairs = zip(
        gradients([compiled(*inputs)], [1.0], inputs),
        gradients([loss(*inputs)], [1.0], inputs),
        strict=True,
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want)


def test_the_operators_keep_torchs_rules():
    """Schemas, fake results, aliasing, autograd registration: torch's own checks."""
    hidden, weight, bias, target, *_ = draw(7, 4, 12, bias=True, dtype=torch.float64)
    target[2] = -100
    seen = []
    original = op._forward
    op._forward = lambda *args: seen.append(args) or original(*args)
    try:
        linear_logprob(hidden, weight, target, bias=bias, return_entropy=True, backend="torch")
    finally:
        op._forward = original
    [arguments] = seen
    torch.library.opcheck(original, arguments)
