"""The Sudoku model: a function of its seed, kept in the cache, right about what is forced."""

from __future__ import annotations

import torch

from rlalign.models.masked_diffusion import Canvas
from rlalign.models.sudoku_model import SudokuRecipe, load_sudoku_model, train_sudoku
from rlalign.tasks.sudoku import BLANK, make_puzzle

QUIET = lambda stage, done, total: None  # noqa: E731
TINY = SudokuRecipe(hidden=8, layers=1, heads=2, steps=4, batch_size=8)


def test_weights_are_a_function_of_the_seed_and_come_back_from_the_cache(tmp_path):
    state = torch.get_rng_state()
    canvas = Canvas(torch.stack([make_puzzle(i, 10) for i in range(3)]))
    trained = train_sudoku(TINY, 1).logits(canvas)
    assert torch.equal(torch.get_rng_state(), state)
    for _ in range(2):  # built, then read
        loaded = load_sudoku_model(1, TINY, tmp_path, QUIET)
        assert torch.equal(loaded.logits(canvas), trained)
    assert len(list((tmp_path / "models").glob("sudoku-*"))) == 1
    assert not torch.equal(train_sudoku(TINY, 2).logits(canvas), trained)


def test_every_cell_sees_every_other_and_a_blank_is_no_answer():
    model = train_sudoku(TINY, 0)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    before = model.logits(Canvas(ids))
    assert bool((before[..., BLANK] == -torch.inf).all())
    ids[0, 15] = 3
    assert not torch.equal(model.logits(Canvas(ids))[0, 0, :4], before[0, 0, :4])
