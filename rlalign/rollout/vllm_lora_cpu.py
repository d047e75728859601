"""Adapters in vLLM on a CPU: all of a batch in two products, in place of its own operators.

vLLM 0.32 gathers the adapter's matrices once for every token, which on a CPU takes several times as
long as the model itself, and its gather reads index -1 (no adapter) as the last adapter: a sequence
of the base model would be changed by whoever is there. Here the matrices of all adapters in the
batch lie side by side: every token is multiplied by all of A, what is not its adapter's is set to
zero, and the product with all of B is added. Ranks are so low that this is cheaper than picking
tokens.

Shapes: N tokens, D input size, O output size, R rank of a place in vLLM's stack, K ranks of all
adapters and slices together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install() -> None:
    """Replace the operators of vLLM's CPU wrapper, for every engine of this process."""
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if PunicaWrapperCPU.add_lora_linear is _add_lora_linear:
        return
    activate = LoRAModelManager.activate_adapter

    def activate_adapter(self: Any, lora_id: int) -> bool:
        moved = activate(self, lora_id)
        if moved:
            for wrapper in self.punica_wrapper_mapping.values():
                wrapper.joined = {}  # of what the places held before
        return moved

    LoRAModelManager.activate_adapter = activate_adapter  # type: ignore[method-assign]
    PunicaWrapperCPU.update_metadata = _update_metadata  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_linear = _add_lora_linear  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_embedding = _add_lora_embedding  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_logits = _add_lora_logits  # type: ignore[method-assign]


class Rows:
    """Which adapter each row of a batch has: its place in vLLM's stacks, -1 for none."""

    def __init__(self, place_N: Tensor) -> None:
        self.place_N = place_N
        found = place_N.unique().tolist()
        self.places = tuple(place for place in found if place >= 0)
        self._uniform = len(found) == 1
        self._own: dict[tuple[int, ...], Tensor] = {}

    def keep_own(self, low_NK: Tensor, place_K: tuple[int, ...]) -> None:
        """Set to 0 what is of another adapter than the row's; `place_K` says whose a column is."""
        if self._uniform:
            return
        own_NK = self._own.get(place_K)
        if own_NK is None:
            own_NK = (self.place_N[:, None] == torch.tensor(place_K)).to(low_NK.dtype)
            self._own[place_K] = own_NK
        low_NK *= own_NK


@dataclass(frozen=True)
class Joined:
    """A layer's matrices of several adapters: y += (x A, each row's own columns) B."""

    a_DK: Tensor
    b_KO: Tensor
    place_K: tuple[int, ...]


def _update_metadata(self: Any, mapping: Any, index_to_id: Any, *args: Any, **kwargs: Any) -> None:
    self._update_base_metadata(mapping, index_to_id, *args)
    self.is_prefill = mapping.is_prefill
    self.token_rows = Rows(self.token_lora_indices.clone())
    self.sampler_rows = Rows(self.sampler_indices.clone())


def _add_lora_linear(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """y[:, slice] += scale * (x A^T) B^T for every slice; A [places, 1, R, D], B [places, 1, O,
    R]."""
    _add(self, self.token_rows, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)


def _add_lora_embedding(
    self: Any, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *_: Any, **__: Any
) -> None:
    """y += x B^T, where x [N, R] are the tokens' rows of A; B [places, 1, O, R]. Some families have
    this layer whatever an adapter's targets are."""
    for place in self.token_rows.places:
        own_N = self.token_rows.place_N == place
        y[own_N] += x[own_N] @ lora_b_stacked[place, 0].T


def _add_lora_logits(
    self: Any, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float,
    **_: Any,
) -> None:  # fmt: skip
    a, b = (lora_a_stacked,), (lora_b_stacked,)
    _add(self, self.sampler_rows, y, x, a, b, scale, (y.shape[-1],))


def _add(
    self: Any, rows: Rows, y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor],
    scale: float, sizes: Sequence[int],
) -> None:  # fmt: skip
    if not rows.places:
        return
    joined = self.joined.get((a[0].data_ptr(), rows.places))
    if joined is None:
        joined = _join(rows.places, a, b, sizes)
        self.joined[a[0].data_ptr(), rows.places] = joined
    low_NK = x.view(-1, x.shape[-1]) @ joined.a_DK
    rows.keep_own(low_NK, joined.place_K)
    y.view(-1, y.shape[-1]).addmm_(low_NK, joined.b_KO, alpha=scale)


def _join(
    places: Sequence[int], a: Sequence[Tensor], b: Sequence[Tensor], sizes: Sequence[int]
) -> Joined:
    """The matrices of these places for all slices, without the rows of A that are 0: an adapter's
    rank may be lower than its place's, and it may leave layers alone."""
    a_KD: list[Tensor] = []
    b_KO: list[Tensor] = []
    place_K: list[int] = []
    for place in places:
        for i, (a_, b_) in enumerate(zip(a, b, strict=True)):
            used_R = a_[place, 0].any(1)
            b_RO = b_[place, 0, : sizes[i]].T[used_R]
            before, width = sum(sizes[:i]), sum(sizes)
            a_KD.append(a_[place, 0][used_R])
            b_KO.append(F.pad(b_RO, (before, width - before - b_RO.shape[1])))
            place_K += [place] * len(b_RO)
    return Joined(torch.cat(a_KD).T.contiguous(), torch.cat(b_KO), tuple(place_K))
