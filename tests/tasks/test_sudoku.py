"""4x4 Sudoku: all grids by brute force, verdicts by loops, puzzles keyed by seed and index."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.tasks import TaskError
from rlalign.tasks.sudoku import (
    BLANK,
    SudokuVerifier,
    all_grids,
    make_puzzle,
    parse_puzzle,
    render,
    split_grids,
)

GROUPS = [
    *([4 * r + c for c in range(4)] for r in range(4)),
    *([4 * r + c for r in range(4)] for c in range(4)),
    *([4 * r + c for r in (a, a + 1) for c in (b, b + 1)] for a in (0, 2) for b in (0, 2)),
]


def is_solved(row: list[int]) -> bool:
    return all({row[cell] for cell in group} == {0, 1, 2, 3} for group in GROUPS)


def solve(row: list[int | None]) -> list[list[int]]:
    """All fillings without a conflict, cell by cell."""
    if None not in row:
        return [row]  # type: ignore[list-item]
    cell = row.index(None)
    peers = {other for group in GROUPS if cell in group for other in group}
    taken = {row[other] for other in peers}
    return [
        grid
        for digit in range(4)
        if digit not in taken
        for grid in solve([*row[:cell], digit, *row[cell + 1 :]])
    ]


def test_all_grids_are_those_that_a_search_finds():
    found = [tuple(grid) for grid in all_grids().tolist()]
    assert len(found) == 288 and set(found) == {tuple(grid) for grid in solve([None] * 16)}


def test_the_split_is_fixed_and_no_grid_is_in_both():
    train, test = split_grids()
    assert len(train) == 200 and len(test) == 88
    assert len(torch.unique(torch.cat([train, test]), dim=0)) == 288
    assert train[0].tolist() == split_grids()[0][0].tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=16, max_size=16), st.sets(st.integers(0, 15)))
def test_a_verdict_is_what_loops_count(row, given_cells):
    puzzle = torch.tensor([row[c] if c in given_cells else BLANK for c in range(16)])
    verdict = SudokuVerifier(puzzle).judge(torch.tensor([row]))
    pairs = {
        (a, b) for group in GROUPS for a in group for b in group if a < b
    }  # a pair of two groups counts once
    clashes = [pair for pair in pairs if row[pair[0]] == row[pair[1]]]
    assert len(pairs) == 56
    assert float(verdict.score_B[0]) == pytest.approx(1 - len(clashes) / 56)
    expected = [1 - sum(cell in pair for pair in clashes) / 7 for cell in range(16)]
    assert verdict.safe_BU[0].tolist() == pytest.approx(expected)
    assert bool(verdict.hard_B[0]) == is_solved(row)


def test_a_changed_given_or_a_blank_is_no_solution():
    grid = split_grids()[1][0]
    other = next(g for g in all_grids() if g[0] != grid[0])
    puzzle = torch.full((16,), BLANK)
    puzzle[0] = grid[0]
    unfilled = grid.clone()
    unfilled[5] = BLANK
    verdict = SudokuVerifier(puzzle).judge(torch.stack([grid, other, unfilled]))
    assert verdict.hard_B.tolist() == [1, 0, 0]
    assert verdict.safe_BU[1, 0] == 0 and verdict.safe_BU[2, 5] == 0


@pytest.mark.parametrize("blanks", [0, 1, 12, 16])
def test_puzzles_are_held_out_grids_with_that_many_blanks(blanks):
    _, test = split_grids()
    for index in (0, 5, 90):
        puzzle = make_puzzle(index, blanks, seed=3)
        filled = puzzle != BLANK
        assert int((~filled).sum()) == blanks
        assert torch.equal(puzzle[filled], test[index % 88][filled])
        assert torch.equal(puzzle, make_puzzle(index, blanks, seed=3))
    if blanks == 12:
        where = {tuple((make_puzzle(i, 12, s) == BLANK).tolist()) for i in (0, 88) for s in (0, 1)}
        assert len(where) == 4
    with pytest.raises(TaskError, match="0 to 16 blanks, not 17"):
        make_puzzle(0, 17)


def test_text_and_grids_are_each_other_s_inverse():
    rng = random.Random(0)
    for index in range(20):
        puzzle = make_puzzle(index, rng.randrange(17))
        assert torch.equal(parse_puzzle(render(puzzle)), puzzle)
    framed = parse_puzzle("12|..\n3_|00\n--+--\n..|..\n..|.1")
    assert framed.tolist() == [0, 1, 4, 4, 2, *[4] * 10, 0]
    for text, cause in {
        "12": "has 2",
        "12345678........": "'5'",
        "11..............": "conflict",
        ".": "has 1",
    }.items():
        with pytest.raises(TaskError, match=cause):
            parse_puzzle(text)
