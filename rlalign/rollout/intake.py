"""New weights for a model in this process: checked as they arrive, copied only when all are there.

A tensor that is the model's own storage (the trainer's module, shared) is digested and left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlalign.rollout.digest import WeightDigest
from rlalign.rollout.engine import EngineError
from rlalign.rollout.staging import UNCHANGED


@torch.no_grad()
def take_weights(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Put `parameters` into `model` and return the digest of what came.

    Names are those of `model.named_parameters()`; a tied weight may come under any of its names, or
    under several with equal values. A tensor may be freed as soon as the next one is asked for.
    Raises EngineError, with nothing copied, for an unknown name, a wrong shape, a value that is not
    finite, a name sent twice, tied weights that differ and missing names.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    digest = WeightDigest()
    names: set[str] = set()
    arrived: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for name, tensor in parameters:
        param = _target(own, name, tensor)
        if name in names:
            raise EngineError(f"weight {name!r} was sent twice in one update. {UNCHANGED}")
        names.add(name)
        _check_finite(name, tensor)
        digest.add(name, tensor)
        _, earlier = arrived.setdefault(id(param), (param, _kept(tensor, param)))
        if not (_same_storage(tensor, earlier) or torch.equal(tensor.to(earlier), earlier)):
            raise EngineError(
                f"{name} is a tied weight of this model, but was sent with different values under "
                f"another name. {UNCHANGED} Untie the engine's model or tie the sender's."
            )
    missing = [name for name, param in own.items() if id(param) not in arrived]
    if missing:
        raise EngineError(
            f"{len(missing)} of {len(own)} weights were not sent (first: {missing[0]}). "
            f"{UNCHANGED} Send model.named_parameters() of the same model, whole."
        )
    for param, value in arrived.values():
        if value is not param:
            param.copy_(value)
    return digest.hexdigest()


def _target(own: dict[str, nn.Parameter], name: str, tensor: Tensor) -> nn.Parameter:
    param = own.get(name)
    if param is None:
        known = ", ".join(list(own)[:3])
        raise EngineError(
            f"weight {name!r} is not one of this model's {len(own)} ({known}, ...). {UNCHANGED} "
            "Send names as in model.named_parameters() of the same model."
        )
    if tensor.shape != param.shape:
        raise EngineError(
            f"{name} was sent with shape {tuple(tensor.shape)}, the model has "
            f"{tuple(param.shape)}. {UNCHANGED}"
        )
    return param


def _kept(tensor: Tensor, param: nn.Parameter) -> Tensor:
    """What will be in `param`: itself, or a copy that outlives `tensor`."""
    return param if _same_storage(tensor, param) else tensor.to(param, copy=True)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()
    return same_kind and a.data_ptr() == b.data_ptr()


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    # One pass without a scratch tensor: both extremes are NaN as soon as one element is.
    low, high = torch.aminmax(tensor)
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int((~tensor.isfinite()).sum())
        raise EngineError(
            f"{count} of {tensor.numel()} values of {name} are not finite: the policy diverged. "
            f"{UNCHANGED} Go back to an earlier checkpoint and lower the learning rate."
        )
