"""4x4 Sudoku: rows, columns and the four 2x2 boxes hold each digit 1 to 4 once.

Tokens 0 to 3 are the digits 1 to 4, token 4 is a blank, which is the mask of the model
(models/sudoku_model.py). All 288 grids are known; a fixed 200 of them are for training. Under a
permutation of the digits they fall into 12 classes, so the test grids test repair, not
generalisation.

Legend: B grids, U = 16 cells, row by row; a unit is a cell, so T = U.
"""

from __future__ import annotations

import functools
import itertools
import random

import torch
from torch import Tensor

from rlalign.tasks.errors import TaskError
from rlalign.tasks.verifier import Verdict

NUM_DIGITS = 4
NUM_CELLS = 16
BLANK = 4
NUM_TRAIN = 200
SYMBOLS = "1234."


@functools.cache
def all_grids() -> Tensor:
    """Every solved grid: int64 [288, 16], in the order of their digits."""
    rows = list(itertools.permutations(range(NUM_DIGITS)))
    pairs = [
        (a, b)
        for a, b in itertools.product(rows, repeat=2)
        if {*a[:2], *b[:2]} == set(range(NUM_DIGITS))  # then the other box is full too
    ]
    grids = [
        (*upper, *lower)
        for (*upper,), (*lower,) in itertools.product(
            (tuple(itertools.chain(*pair)) for pair in pairs), repeat=2
        )
        if all(len({*upper[c::4], *lower[c::4]}) == NUM_DIGITS for c in range(NUM_DIGITS))
    ]
    return torch.tensor(grids)


@functools.cache
def split_grids() -> tuple[Tensor, Tensor]:
    """Grids of training and of evaluation, int64 [200, 16] and [88, 16]; never changes."""
    order = random.Random("sudoku/split").sample(range(len(all_grids())), len(all_grids()))
    return all_grids()[order[:NUM_TRAIN]], all_grids()[order[NUM_TRAIN:]]


def make_puzzle(index: int, num_blanks: int, seed: int = 0) -> Tensor:
    """Evaluation grid `index` mod 88 with that many blanks, int64 [16]; which cells is keyed by
    (seed, index). There may be several solutions. Raises TaskError unless 0 <= num_blanks <= 16."""
    if not 0 <= num_blanks <= NUM_CELLS:
        raise TaskError(f"a puzzle has 0 to {NUM_CELLS} blanks, not {num_blanks}: choose fewer")
    _, grids = split_grids()
    puzzle_U = grids[index % len(grids)].clone()
    blanks = random.Random(f"sudoku/{seed}/{index}").sample(range(NUM_CELLS), num_blanks)
    puzzle_U[blanks] = BLANK
    return puzzle_U


def parse_puzzle(text: str) -> Tensor:
    """int64 [16] of 16 symbols: digits 1 to 4, and `.`, `0` or `_` for a blank; white space, `|`,
    `-` and `+` do not count. Raises TaskError for anything else, and for givens that conflict.

    >>> parse_puzzle("12.. 3... .... ...1").tolist()
    [0, 1, 4, 4, 2, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 0]
    """
    symbols = "".join(text.split()).translate(str.maketrans("0_", "..", "|-+"))
    wrong = sorted(set(symbols) - set(SYMBOLS))
    if wrong or len(symbols) != NUM_CELLS:
        raise TaskError(
            f"a 4x4 puzzle has {NUM_CELLS} symbols out of 1234 and '.' for a blank; {text!r} has "
            + (f"{wrong[0]!r}" if wrong else f"{len(symbols)}")
        )
    puzzle_U = torch.tensor([SYMBOLS.index(symbol) for symbol in symbols])
    if bool(_conflicts(puzzle_U[None]).any()):
        raise TaskError(f"the givens of {text!r} conflict: it has no solution; mend the puzzle")
    return puzzle_U


def render(ids_U: Tensor) -> str:
    """Four lines of four symbols, `.` for a blank."""
    symbols = [SYMBOLS[token] for token in ids_U.tolist()]
    return "\n".join("".join(symbols[i : i + 4]) for i in range(0, NUM_CELLS, 4))


class SudokuVerifier:
    """Judges fillings of one puzzle.

    A cell's safety is 1 - conflicts / 7, for the other cells of its row, column and box with its
    digit; 0 where a given was changed or a blank is left. The score is the share of the 56 pairs
    of such cells that differ; `hard_B` is 1 for a solution of the puzzle, else 0.
    """

    num_units = NUM_CELLS

    def __init__(self, puzzle_U: Tensor) -> None:
        self.puzzle_U = puzzle_U

    def judge(self, ids_BT: Tensor) -> Verdict:
        ids_BT = ids_BT.cpu()
        conflicts_BU = _conflicts(ids_BT)
        wrong_BU = (self.puzzle_U != BLANK) & (ids_BT != self.puzzle_U) | (ids_BT == BLANK)
        safe_BU = (1 - conflicts_BU / _peers().sum(1)).masked_fill(wrong_BU, 0)
        score_B = 1 - conflicts_BU.sum(1) / _peers().sum()
        return Verdict(score_B, safe_BU, (safe_BU == 1).all(1).double())


def _conflicts(ids_BU: Tensor) -> Tensor:
    """How many peers of each cell hold its digit: float64 [B, 16]; a blank conflicts with none."""
    equal_BUU = (ids_BU[:, :, None] == ids_BU[:, None]) & (ids_BU != BLANK)[:, :, None]
    return (equal_BUU & _peers()).sum(2).double()


@functools.cache
def _peers() -> Tensor:
    """Which cells share a row, a column or a box: bool [16, 16], without the diagonal."""
    row, column = torch.arange(NUM_CELLS) // 4, torch.arange(NUM_CELLS) % 4
    box = row // 2 * 2 + column // 2
    same = [place[:, None] == place for place in (row, column, box)]
    return (same[0] | same[1] | same[2]) & ~torch.eye(NUM_CELLS, dtype=torch.bool)
