"""What a search at test time asks of a domain: how good a sequence is, and where it is wrong.

Legend: B sequences, T tokens of one, U units (the pieces that are judged and edited: cells, lines,
waypoints).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """Of sequences: how good each is, and which of its units are fine."""

    score_B: Tensor  # float32, higher is better
    safe_BU: Tensor  # float32 in [0, 1], 1 = fine
    hard_B: Tensor  # float32 in [0, 1], compared before the score


class Verifier(Protocol):
    """Judges whole sequences; a pure function of them."""

    num_units: int

    def judge(self, ids_BT: Tensor) -> Verdict: ...
