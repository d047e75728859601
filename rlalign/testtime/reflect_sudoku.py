"""Sudoku for `rlalign decode reflect`: cells are repaired one by one, each digit of a cell tried
with the rest of the grid written anew around it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlalign.config import ReflectConfig, parse
from rlalign.models.building import Progress
from rlalign.models.masked_diffusion import Canvas
from rlalign.models.sudoku_model import load_sudoku_model
from rlalign.tasks.errors import TaskError
from rlalign.tasks.sudoku import (
    BLANK,
    NUM_CELLS,
    NUM_DIGITS,
    SYMBOLS,
    SudokuVerifier,
    make_puzzle,
    parse_puzzle,
    render,
)
from rlalign.testtime.domain import Item, item_name
from rlalign.testtime.drafts import SampleDrafts
from rlalign.testtime.neighbourhoods import Grammar
from rlalign.testtime.problem import Problem, UnitMap
from rlalign.testtime.reflect import Reflector, ReflectResult

DEFAULTS = {"steps": 2, "max_iters": 8, "regen": "all", "max_anchors": 5}
CELLS = UnitMap.even(NUM_CELLS)


class SudokuDomain:
    """4x4 puzzles: `{"puzzle": "12.. 3... .... ...1"}`, or puzzles of its own with `blanks` blanks.
    With `drafts` > 1 the first sequence is the best of that many samples."""

    OPTIONS: Mapping[str, Any] = {"blanks": 12, "drafts": 1}
    OWN = frozenset({"blanks"})

    def __init__(
        self, overrides: Sequence[str], progress: Progress | None, *, blanks: int, drafts: int
    ) -> None:
        config = parse(ReflectConfig, DEFAULTS, overrides)
        self.blanks, self.seed = blanks, config.seed
        first = SampleDrafts(drafts, 0.0 if drafts == 1 else 1.0)
        self.make(0)  # a wrong number of drafts or blanks is told before a model is built
        self.reflector = Reflector(
            load_sudoku_model(progress=progress),
            Grammar([[digit] for digit in range(NUM_DIGITS)]),
            drafts=first,
            completion="model",
            config=config,
        )

    def make(self, index: int) -> Item:
        puzzle_U = make_puzzle(index, self.blanks, self.seed)
        return _item(puzzle_U, f"sudoku/{self.blanks}/{self.seed}/{index}")

    def read(self, row: Mapping[str, Any], name: str) -> Item:
        puzzle = row.get("puzzle")
        if not isinstance(puzzle, str):
            raise TaskError('no puzzle: give {"puzzle": "12.. 3... .... ...1"}')
        return _item(parse_puzzle(puzzle), item_name(row, name))

    def describe(self, item: Item, ids_T: Tensor) -> str:
        return " ".join(render(ids_T).split())

    def describe_unit(self, tokens: Sequence[int]) -> str:
        return "".join(SYMBOLS[token] for token in tokens)

    def measure(self, item: Item, ids_T: Tensor) -> dict[str, float]:
        return {}

    def picture(self, item: Item, result: ReflectResult) -> str:
        draft = _table(item.source, result.draft_T, result.before.violated)
        repaired = _table(item.source, result.ids_T, result.after.violated)
        return f'<div class="pair">{draft}<span class="arrow">&rarr;</span>{repaired}</div>'


def _item(puzzle_U: Tensor, name: str) -> Item:
    problem = Problem(Canvas(puzzle_U[None]), SudokuVerifier(puzzle_U), CELLS, name)
    return Item(problem, puzzle_U)


def _table(puzzle_U: Tensor, ids_U: Tensor, violated: Sequence[int]) -> str:
    """A grid in which givens are bold and conflicting cells marked."""
    rows = []
    for first in range(0, NUM_CELLS, 4):
        cells = []
        for cell in range(first, first + 4):
            kinds = ["given"] * (int(puzzle_U[cell]) != BLANK) + ["bad"] * (cell in violated)
            symbol = html.escape(SYMBOLS[int(ids_U[cell])])
            cells.append(f'<td class="{" ".join(kinds)}">{symbol}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="grid">{"".join(rows)}</table>'
