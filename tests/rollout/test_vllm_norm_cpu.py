"""RMSNorm by vLLM's kernel: what the formula says, in place of seven operators."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

D = 48


@pytest.fixture
def norm():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()):
        layer = RMSNorm(D, eps=1e-5)
    layer.weight.data.copy_(torch.randn(D, generator=torch.Generator().manual_seed(1)))
    return layer


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(1, D), (33, D), (3, 5, D)])  # the last is left to vLLM
def test_rows_are_normed_with_and_without_a_residual(norm, shape):
    from rlalign.rollout import vllm_norm_cpu

    rng = torch.Generator().manual_seed(0)
    x, residual = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    x[0, 0] = 1e4
    total, before = x + residual, x.clone()
    got = vllm_norm_cpu.forward(norm, x)
    torch.testing.assert_close(got.double(), normed(x, norm.weight), atol=1e-5, rtol=1e-6)
    assert torch.equal(x, before)
    got, summed = vllm_norm_cpu.forward(norm, x, residual)
    torch.testing.assert_close(got.double(), normed(total, norm.weight), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(summed, total, atol=0, rtol=0)
