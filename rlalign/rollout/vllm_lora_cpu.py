"""Adapters in vLLM on a CPU: grouped by adapter, in place of its own operators.

vLLM 0.32 gathers the adapter's matrices once for every token, which on a CPU takes several times as
long as the model itself, and its gather reads index -1 (no adapter) as the last adapter: a sequence
of the base model would be changed by whoever is there. Here the tokens of each adapter are
multiplied together, and those without one are left alone.

Shapes: N tokens, D input size, O output size of a slice, R highest rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def install() -> None:
    """Replace the operators of vLLM's CPU wrapper, for every engine of this process."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    PunicaWrapperCPU.update_metadata = _update_metadata  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_linear = _add_lora_linear  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_logits = _add_lora_logits  # type: ignore[method-assign]


def _update_metadata(self: Any, mapping: Any, index_to_id: Any, *args: Any, **kwargs: Any) -> None:
    self._update_base_metadata(mapping, index_to_id, *args)
    self.is_prefill = mapping.is_prefill
    self.token_groups = _groups(self.token_lora_indices)
    self.sampler_groups = _groups(self.sampler_indices)


def _groups(index_N: Tensor) -> list[tuple[int, Tensor | None]]:
    """(adapter's place, 1 at its rows and 0 elsewhere [N, 1]) of every adapter in the batch; None
    where all rows are its."""
    places = [place for place in index_N.unique().tolist() if place >= 0]
    if len(places) == 1 and bool((index_N >= 0).all()):
        return [(places[0], None)]
    return [(place, (index_N == place).float()[:, None]) for place in places]


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
    y_NO, x_ND = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for group in self.token_groups:
        first = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            _add(y_NO[:, first : first + size], x_ND, a, b, scale, *group)
            first += size


def _add_lora_logits(
    self: Any, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float,
    **_: Any,
) -> None:  # fmt: skip
    y_NO, x_ND = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for group in self.sampler_groups:
        _add(y_NO, x_ND, lora_a_stacked, lora_b_stacked, scale, *group)


def _add(
    y_NO: Tensor, x_ND: Tensor, a: Tensor, b: Tensor, scale: float, place: int, mask: Tensor | None
) -> None:
    """y += scale * (x A^T) B^T at the rows of one adapter, for the columns that B has. The rank is
    so low that it is cheaper to compute all rows and mask them than to pick them."""
    low_NR = x_ND @ a[place, 0].T
    if mask is not None:
        low_NR *= mask
    b_OR = b[place, 0][: y_NO.shape[1]]
    y_NO[:, : len(b_OR)].addmm_(low_NR, b_OR.T, alpha=scale)
