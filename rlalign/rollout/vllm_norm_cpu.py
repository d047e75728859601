"""RMSNorm in vLLM on a CPU by the kernel that comes with it.

vLLM 0.32 has one for CPUs and leaves it aside there, for a compiler that fuses PyTorch's operators.
Without a compiler these are seven calls where the kernel is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.layernorm import RMSNorm


def install() -> None:
    """For every engine that this process starts from now on."""
    RMSNorm.forward_cpu = forward  # type: ignore[method-assign]


def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """As RMSNorm.forward_native: the norm of x [N, D]; with a residual, which is added to x before,
    the norm and the sum, written over the arguments. What the kernel does not do is left to
    vLLM."""
    plain = type(self) is RMSNorm and self.has_weight and self.variance_size_override is None
    if not (plain and x.dim() == 2 and x.is_contiguous() and x.dtype == self.weight.dtype):
        return self.forward_native(x, residual)
    if residual is None:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, self.weight.data, self.variance_epsilon)
        return out
    torch.ops._C.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
    return x, residual
