"""The written-out RMSNorm against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from rlalign.models.norm import quicken_norms, rms_norm
from rlalign.models.random import init_model, small_config


def test_the_gradient_is_the_formulas():
    rng = torch.Generator().manual_seed(0)
    hidden, weight, grad = (
        torch.randn(shape, generator=rng, dtype=torch.float64)
        for shape in [(2, 5, 7), 7, (2, 5, 7)]
    )
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    plain = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    ours = rms_norm(hidden, weight, 1e-3)
    torch.testing.assert_close(ours, plain, atol=1e-14, rtol=0)
    for got, want in zip(
        torch.autograd.grad(ours, [hidden, weight], grad),
        torch.autograd.grad(plain, [hidden, weight], grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=0)
    assert torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, 1e-3), (hidden, weight))


@pytest.mark.parametrize(("architecture", "count"), [("qwen2", 5), ("qwen3", 9), ("gemma2", 0)])
def test_only_what_computes_the_formula_is_replaced(architecture, count):
    config = small_config(
        architecture, vocab=31, hidden=16, layers=2, heads=2, kv_heads=1, mlp=24,
        max_positions=32, tied=True, init_std=0.2,
    )  # fmt: skip
    own, ours = init_model(config, 0), init_model(config, 0)
    assert quicken_norms(ours) == count
    ids = torch.arange(20)[None]
    a, b = own(ids).logits, ours(ids).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for p, q in zip(
        torch.autograd.grad(a.square().sum(), list(own.parameters())),
        torch.autograd.grad(b.square().sum(), list(ours.parameters())),
        strict=True,
    ):
        assert (p - q).norm() <= 1e-5 * p.norm()


def test_other_dtypes_keep_the_models_own_arithmetic():
    config = small_config(
        "qwen2", vocab=31, hidden=16, layers=1, heads=2, kv_heads=1, mlp=24, max_positions=32,
        tied=True,
    )  # fmt: skip
    own, ours = init_model(config, 0), init_model(config, 0)
    quicken_norms(ours)
    ids = torch.arange(9)[None]
    assert torch.equal(own.bfloat16()(ids).logits, ours.bfloat16()(ids).logits)
