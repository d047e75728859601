"""Verifiers of whole sequences: what a search that repairs its own drafts asks.

A sequence consists of units, each some of its tokens: a waypoint, a cell, a line. A verifier says
how good a sequence is, and which of its units are at fault.

Legend: B sequences, T tokens, U units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """On B sequences, float64. `hard_B`, in [0, 1], is what no other virtue makes up for: of two
    sequences the one with the larger (hard, score) is better. `safe_BU` is 1 where a unit is fine,
    and less where it breaks something.

    >>> # two plans of two waypoints; the second one collides at its end
    >>> # score_B=[0.9, 0.0], hard_B=[1, 0], safe_BU=[[1, 1], [1, 0]]
    """

    score_B: Tensor
    safe_BU: Tensor
    hard_B: Tensor
    num_invalid: int = 0  # sequences that could not be judged, and count as worth nothing


class Verifier(Protocol):
    """What can judge complete sequences of one problem."""

    num_units: int

    def judge(self, ids_BT: Tensor) -> Verdict:
        """Of sequences without a mask token, int64 [B, T]; a row depends on that row alone."""
        ...
