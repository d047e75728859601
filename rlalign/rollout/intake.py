"""New weights for a model in this process: checked as they arrive, copied only when all are there.

A tensor that is the model's own storage (the trainer's module, shared) is digested and left alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlalign.rollout.staging import own_names, take_in


@torch.no_grad()
def take_weights(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Put `parameters` into `model` and return the digest of what came.

    Names are those of `model.named_parameters()`; a tied weight may come under any of its names, or
    under several with equal values. A tensor may be freed as soon as the next one is asked for.
    Raises EngineError, with nothing copied, for an unknown name, a wrong shape, a value that is not
    finite, a name sent twice, tied weights that differ and missing names.
    """
    own = dict(model.named_parameters())
    arrived: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Tensor:
        param = own[name]
        if _same_storage(tensor, param):
            return param
        return arrived.setdefault(name, tensor.to(param, copy=True))

    shapes = {name: param.shape for name, param in own.items()}
    digest = take_in(own_names(model), shapes, parameters, keep)
    for name, value in arrived.items():
        own[name].copy_(value)
    return digest


def _same_storage(a: Tensor, b: Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()
    return same_kind and a.data_ptr() == b.data_ptr()
