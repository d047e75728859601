"""Waypoints as tokens: one uniform grid for both coordinates.

    token(v) = round((v + extent) / step), clipped to [0, size - 1];    v = token step - extent

A plan of N waypoints is the 2N tokens (x_1, y_1, ..., x_N, y_N), within step / 2 of it in each
coordinate. The mask token of a model of plans is `size`.

Legend: N waypoints, T = 2N tokens, C candidates, [...] any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from rlalign.tasks.errors import TaskError


@dataclass(frozen=True, slots=True)
class Codebook:
    """The grid from -`extent_m` to `extent_m` with spacing `step_m`: 401 values by default.

    Raises TaskError unless the spacing divides the extent.
    """

    extent_m: float = 50.0
    step_m: float = 0.25

    def __post_init__(self) -> None:
        sizes = (self.extent_m, self.step_m)
        if not all(math.isfinite(size) and size > 0 for size in sizes):
            raise TaskError(f"a codebook needs a positive extent and step, not {sizes}")
        steps = self.extent_m / self.step_m
        if steps < 1 or abs(steps - round(steps)) > 1e-9 * steps:
            raise TaskError(
                f"step_m={self.step_m} does not divide extent_m={self.extent_m}: the grid would "
                "not be symmetric; take a divisor"
            )

    @property
    def size(self) -> int:
        return 2 * round(self.extent_m / self.step_m) + 1

    def encode(self, points_N2: ndarray) -> Tensor:
        """Tokens int64 [..., 2N] of waypoints [..., N, 2]; those outside go to the border.

        Raises TaskError for a coordinate that is not finite.
        """
        if not np.isfinite(points_N2).all():
            raise TaskError("a waypoint is not finite: it has no token; mend the trajectory first")
        ids = np.rint((points_N2 + self.extent_m) / self.step_m).clip(0, self.size - 1)
        return torch.from_numpy(ids.astype(np.int64)).flatten(-2)

    def decode(self, ids_T: Tensor) -> ndarray:
        """Waypoints float64 [..., N, 2] of tokens [..., 2N].

        Raises TaskError for an odd number of tokens, or one that names no value (the mask).
        """
        if ids_T.shape[-1] % 2:
            raise TaskError(f"{ids_T.shape[-1]} tokens are no pairs (x, y)")
        if ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < self.size:
            raise TaskError(
                f"tokens from {int(ids_T.min())} to {int(ids_T.max())}: this codebook has 0 to "
                f"{self.size - 1}; a canvas must be filled before it is decoded"
            )
        return ids_T.unflatten(-1, (-1, 2)).cpu().numpy() * self.step_m - self.extent_m

    def count_clipped(self, points_N2: ndarray) -> int:
        """How many waypoints lie outside the grid."""
        return int((np.abs(points_N2) > self.extent_m).any(-1).sum())

    def shift(self, ids_T: Tensor, unit: int, candidates_C2: Tensor) -> Tensor:
        """The plan `ids_T` with each candidate as waypoint `unit` (from 0): int64 [C, T].

        What comes after moves along with it, and the waypoint before by half as much (rounded
        towards 0), so that no kink appears. Tokens stay within the grid.
        """
        plans_CN2 = ids_T.unflatten(-1, (-1, 2)).repeat(len(candidates_C2), 1, 1)
        moved_C2 = candidates_C2 - plans_CN2[:, unit]
        plans_CN2[:, unit:] += moved_C2[:, None]
        if unit > 0:
            plans_CN2[:, unit - 1] += torch.div(moved_C2, 2, rounding_mode="trunc")
        return plans_CN2.clamp(0, self.size - 1).flatten(-2)
