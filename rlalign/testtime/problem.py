"""What a search is given: a canvas, its units, and who judges.

Legend: T columns of a canvas, U units, L columns of one unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.models.masked_diffusion import Canvas
from rlalign.tasks.verifier import Verifier
from rlalign.testtime.errors import DecodeError


@dataclass(frozen=True, slots=True)
class UnitMap:
    """Which columns belong to which unit: cells, lines, waypoints. Columns of no unit are allowed;
    they are written by the model alone.

    >>> UnitMap.even(8, 2)  # eight waypoints (x, y): unit 0 is columns 0 and 1
    """

    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def even(cls, num_units: int, size: int = 1, start: int = 0) -> UnitMap:
        """Units of `size` neighbouring columns each, the first at column `start`."""
        first = range(start, start + num_units * size, size)
        return cls(tuple(tuple(range(column, column + size)) for column in first))

    def __len__(self) -> int:
        return len(self.columns)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.columns)

    def positions(self, unit: int) -> Tensor:
        """Columns of a unit, int64 [L]."""
        return torch.tensor(self.columns[unit])


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One sequence to be written: what is masked in `canvas`, which has one row, is free, all else
    stays. `id` keys what is drawn."""

    canvas: Canvas
    verifier: Verifier
    units: UnitMap
    id: str = ""


def check_problem(problem: Problem) -> None:
    """Raise DecodeError for a problem whose parts do not fit each other."""
    where = f"problem {problem.id!r}"
    rows, columns = problem.canvas.ids_BT.shape
    if rows != 1:
        raise DecodeError(f"{where}: a canvas of 1 row is wanted, not {rows}; split it")
    if problem.verifier.num_units != len(problem.units):
        raise DecodeError(
            f"{where}: the verifier judges {problem.verifier.num_units} units, the unit map has "
            f"{len(problem.units)}; give both the same"
        )
    taken = [column for unit in problem.units for column in unit]
    if len(set(taken)) < len(taken) or not all(0 <= column < columns for column in taken):
        raise DecodeError(
            f"{where}: units must be disjoint columns of 0 to {columns - 1}, not {list(taken)}"
        )
    if not all(problem.units):
        raise DecodeError(f"{where}: a unit has no columns; leave it out")
