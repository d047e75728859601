"""Weights on their way into an engine: checked and copied whole before the engine sees any of them.

An engine that loads a stream in place is left with half a policy when the stream breaks. So the
receiver keeps two host copies: the weights in use, and the ones arriving. Only a complete and valid
set is handed on, and if the engine then fails to take it, the set in use is still here to put back.
The digest is taken of what arrived, as it arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from rlalign.rollout.digest import WeightDigest
from rlalign.rollout.engine import EngineError


class WeightStage:
    """Two sets of host tensors for the parameters of `model`, which may be on the meta device.

    Names are those of `model.named_parameters()`; a tied weight may come under any of its names, or
    under several with equal values. Copies are kept in `dtype`, the engine's.

    >>> stage = WeightStage(model, torch.float32)                              # doctest: +SKIP
    >>> digest = stage.receive(trainer_model.named_parameters())
    >>> load(stage.arrived); stage.commit()
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._shapes = {name: param.shape for name, param in model.named_parameters()}
        self._own_name = own_names(model)
        self._dtype = dtype
        self.arrived: dict[str, torch.Tensor] = {}
        self.in_use: dict[str, torch.Tensor] | None = None  # None: as read from the model folder

    @torch.no_grad()
    def receive(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
        """Copy `parameters` into `arrived` and return the digest of what came.

        A tensor may be freed as soon as the next one is asked for. Raises EngineError for an
        unknown name, a wrong shape, a value that is not finite, a name sent twice, tied weights
        that differ and missing names.
        """
        if not self.arrived:
            self.arrived = {n: torch.empty(s, dtype=self._dtype) for n, s in self._shapes.items()}
        return take_in(self._own_name, self._shapes, parameters, self._copy)

    def commit(self) -> None:
        """What arrived is in use now."""
        self.arrived, self.in_use = self.in_use or {}, self.arrived

    def forget(self) -> None:
        """Neither is in use: the model folder is again."""
        self.arrived, self.in_use = self.in_use or self.arrived, None

    def _copy(self, own_name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.arrived[own_name].copy_(tensor)


UNCHANGED = "The old weights stay in use."


def own_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter of `model`, mapped to the one `named_parameters` gives it."""
    own = {id(param): name for name, param in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    return {name: own[id(param)] for name, param in everything}


def take_in(
    own_name: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
    parameters: Iterable[tuple[str, torch.Tensor]],
    keep: Callable[[str, torch.Tensor], torch.Tensor],
) -> str:
    """Check `parameters` as they come, `keep` each weight once, and return the digest of what came.

    `shapes` are the model's, by own name; `keep` gets a weight's own name and its tensor, which may
    be freed afterwards, and returns what will be used.
    """
    digest = WeightDigest()
    sent: set[str] = set()
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in parameters:
        _check_fit(name, tensor, own_name, shapes)
        if name in sent:
            raise EngineError(f"weight {name!r} was sent twice in one update. {UNCHANGED}")
        sent.add(name)
        digest.add(name, tensor)
        own = own_name[name]
        if own not in kept:
            kept[own] = keep(own, tensor)
            _check_finite(name, kept[own])
        elif not torch.equal(kept[own], tensor.to(kept[own])):
            raise EngineError(
                f"{name} and {own} are one tied weight of this model, but were sent with different "
                f"values. {UNCHANGED} Untie the engine's model or tie the sender's."
            )
    missing = [name for name in shapes if name not in kept]
    if missing:
        raise EngineError(
            f"{len(missing)} of {len(shapes)} weights were not sent (first: {missing[0]}). "
            f"{UNCHANGED} Send the whole of model.named_parameters()."
        )
    return digest.hexdigest()


def _check_fit(
    name: str,
    tensor: torch.Tensor,
    own_name: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
) -> None:
    if name not in own_name:
        known = ", ".join(list(shapes)[:3])
        raise EngineError(
            f"weight {name!r} is not one of this model's {len(shapes)} ({known}, ...). {UNCHANGED} "
            "Send names as in model.named_parameters() of the same model."
        )
    expected = shapes[own_name[name]]
    if tensor.shape != expected:
        raise EngineError(
            f"{name} was sent with shape {tuple(tensor.shape)}, the model has {tuple(expected)}. "
            f"{UNCHANGED}"
        )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
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
