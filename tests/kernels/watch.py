"""Watching which tensors a computation makes, and what its host waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlalign.kernels import op

WITHIN = {
    torch.ops.rlalign.linear_logprob.default: op.forward,
    torch.ops.rlalign.linear_logprob_backward.default: op.backward,
}


class Watch(TorchDispatchMode):
    """While it lasts, `seen` gets every tensor that an operator returns; operators of rlalign are
    looked into, which torch itself would not do."""

    def __init__(self, seen: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rlalign":
            with self:
                return WITHIN[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen(tensor)
        return out


class Waits(Watch):
    """Notes the operators for whose result the host has to wait. Within an operator of ours torch
    shows `item` and the like; elsewhere what they are made of."""

    NAMES = (
        "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "argwhere",
        "masked_select", "equal", "allclose", "_unique2", "unique_dim", "repeat_interleave",
    )  # fmt: skip

    def __init__(self):
        super().__init__(lambda tensor: None)
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        masks = any(x is not None and x.dtype == torch.bool for x in indices)
        if name in self.NAMES or masks:
            self.found.append(name)
        return super().__torch_dispatch__(func, types, args, kwargs)
