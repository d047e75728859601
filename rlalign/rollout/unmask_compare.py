"""What a faster sampler saves and what it costs: the same canvases filled in several ways.

tokens per forward   how many tokens a forward pass of a row decides; one token a step: 1
disagreement         share of the filled tokens that are not those of the first way: of a cache,
                     how far it is from the exact sampler
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rlalign.models.masked_diffusion import Canvas, MaskedModel
from rlalign.rollout.unmask import UnmaskParams, unmask


@dataclass(frozen=True, slots=True)
class Fill:
    """One way of filling, over all rows.

    >>> Fill(tokens=512, forwards=170, seconds=1.2, accuracy=0.81, disagreement=0.06)
    """

    tokens: int
    forwards: int  # of one row each
    seconds: float
    accuracy: float  # mean of what `grade` says
    disagreement: float

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(1, self.forwards)


def compare(
    model: MaskedModel,
    canvas: Canvas,
    ways: Mapping[str, UnmaskParams],
    seed_B: Tensor,
    grade: Callable[[Tensor], Tensor],
    *,
    start: int = 0,
) -> dict[str, Fill]:
    """Fill `canvas` in each of the `ways`. `grade` takes ids [B, T] and says how right each row is,
    [B]. Raises EngineError as `unmask` does."""
    fills: dict[str, Fill] = {}
    first_BT = canvas.ids_BT
    for name, params in ways.items():
        began = time.perf_counter()
        filled = unmask(model, canvas, params, seed_B, start=start)
        forwards = int(filled.forwards_B.sum())  # waits for the device
        seconds = time.perf_counter() - began
        if not fills:
            first_BT = filled.ids_BT
        open_BT = canvas.ids_BT != filled.ids_BT
        tokens = int(open_BT.sum())
        differing = int((filled.ids_BT != first_BT).sum())
        accuracy = float(grade(filled.ids_BT).float().mean())
        fills[name] = Fill(tokens, forwards, seconds, accuracy, differing / max(1, tokens))
    return fills
