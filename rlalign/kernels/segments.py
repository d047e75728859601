"""Tokens of many segments (samples, or sets of them) as right-padded batches of similar lengths.

Shapes: N tokens, J segments of all, S segments of a batch, T places of its longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH_RATIO = 0.8  # a segment shorter than this share of its batch's longest opens a new one


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    """Which tokens belong to which of J segments; built on the CPU, where sizes are needed.

    >>> segments = Segments.of(torch.tensor([1, 0, 1, -1]), 2)  # -1: to none
    >>> segments.padded(torch.tensor([1, 0]))
    (tensor([[0, 2], [1, 1]]), tensor([[ True,  True], [ True, False]]))
    """

    order_N: Tensor  # tokens, segment after segment
    start_J: Tensor  # where in it each segment begins
    length_J: Tensor

    @staticmethod
    def of(segment_N: Tensor, count: int) -> Segments:
        """Raises ValueError for a segment from `count` on; negative ones are left out."""
        segment_N = segment_N.cpu()
        if len(segment_N) and int(segment_N.max()) >= count:
            raise ValueError(f"a segment is {int(segment_N.max())}, there are {count}")
        length_J = torch.bincount(segment_N[segment_N >= 0], minlength=count)
        left_out = int((segment_N < 0).sum())
        start_J = length_J.cumsum(0) - length_J + left_out
        return Segments(segment_N.argsort(stable=True), start_J, length_J)

    def batches(self, max_tokens: int) -> Iterator[Tensor]:
        """Segments with tokens, longest first, cut into batches that take up to `max_tokens` with
        their padding; a longer segment is alone."""
        order = self.length_J.argsort(descending=True, stable=True)
        lengths = self.length_J[order].tolist()
        first, total = 0, len(lengths) - lengths.count(0)
        for i in range(1, total + 1):
            full = i == total or (
                lengths[i] < LENGTH_RATIO * lengths[first]
                or (i + 1 - first) * lengths[first] > max_tokens
            )
            if full:
                yield order[first:i]
                first = i

    def padded(self, segment_S: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of segments `segment_S` [S, T], and which places are no padding. Padding repeats a
        segment's last token, so that what is not finite stays in its segment."""
        length_S1 = self.length_J[segment_S, None]
        place_T = torch.arange(int(length_S1.max()), device="cpu")
        inside_ST = place_T < length_S1
        last_S1 = (length_S1 - 1).clamp(min=0)
        place_ST = self.start_J[segment_S, None] + torch.minimum(place_T, last_S1)
        return self.order_N[place_ST.clamp(max=len(self.order_N) - 1)], inside_ST
