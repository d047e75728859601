"""The ways of `kernels` to get log-probs of a head, ours and others': name -> function of (hidden,
weight, target) that returns logp [N] or (logp [N], entropy [N]).

Each is used as its authors mean it to be, with the options that make it fast and per-token upstream
gradients honoured. A peer that is not installed, or that does not know this device, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from rlalign.kernels.linear_logprob import linear_logprob

Peer = Callable[..., Any]


def ours(entropy: bool, **options: Any) -> Peer:
    def run(hidden, weight, target):
        out = linear_logprob(hidden, weight, target, return_entropy=entropy, **options)
        return (out.logp, out.entropy) if entropy else out.logp

    return run


def eager(hidden, weight, target):
    """All logits, as most trainers do it: rounded to the inputs' dtype, softmax in float32."""
    logp = torch.log_softmax((hidden @ weight.T).float(), -1)
    return logp.gather(1, target[:, None])[:, 0]


def eager_entropy(hidden, weight, target):
    logp = torch.log_softmax((hidden @ weight.T).float(), -1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def torch_linear_cross_entropy(chunk: int) -> Peer:
    """torch >= 2.13; no entropy."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def run(hidden, weight, target):
        return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)

    return run


def trl(entropy: bool) -> Peer:
    """TRL >= 1.16."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ("entropy",) if entropy else ()

    def run(hidden, weight, target):
        out = ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, 32768, None, 1.0, outputs
        )
        return out[:2] if entropy else out[0]

    return run


def liger_scaled(entropy: bool) -> Peer:
    """Liger >= 0.8: CuTe on Hopper (with its `cutedsl` extra), 512-row chunks elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    def run(hidden, weight, target):
        out = Function.apply(hidden, weight, target, 1.0, -100, 1, entropy)
        return (-out[0], out[1]) if entropy else -out

    return run


def liger_fused() -> Peer:
    """Liger's fused linear cross-entropy; no entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Function,
    )

    def run(hidden, weight, target):
        out = Function.apply(hidden, weight, target, None, None, -100, 0.0, 0.0, "none")
        return -(out[0] if isinstance(out, tuple) else out)

    return run


def cut_cross_entropy(**options: Any) -> Peer:
    """Apple's; no entropy. Its default filters gradients; filter_eps=None does not."""
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden, weight, target):
        return -linear_cross_entropy(hidden, weight, target, reduction="none", **options)

    return run


def candidates(device: str, entropy: bool) -> dict[str, Callable[[], Peer]]:
    """Builders by name, ours first; a builder raises ImportError or AttributeError where its peer
    is not there."""
    compiled = eager_entropy if entropy else eager
    table: dict[str, Callable[[], Peer]] = {
        "rlalign": lambda: ours(entropy),
        "torch eager": lambda: compiled,
        "torch.compile": lambda: torch.compile(compiled, dynamic=False),
        "TRL chunked": lambda: trl(entropy),
        "Liger scaled CE": lambda: liger_scaled(entropy),
    }
    if device == "cuda":
        table["rlalign, torch"] = lambda: ours(entropy, backend="torch")
        table["rlalign, fused"] = lambda: ours(entropy, backward="fused")
    if not entropy:
        table["F.linear_cross_entropy 256"] = lambda: torch_linear_cross_entropy(256)
        table["F.linear_cross_entropy 1024"] = lambda: torch_linear_cross_entropy(1024)
    if device == "cuda" and not entropy:
        table["Liger FLCE"] = liger_fused
        table["cut-cross-entropy"] = cut_cross_entropy
        table["cut-cross-entropy, exact"] = lambda: cut_cross_entropy(filter_eps=None)
    return table
