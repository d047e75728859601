"""The strengths' kernel against the plain search; run by test_interpreted.py, and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.kernels import alpha_search_triton
from rlalign.kernels.alpha_search import measure, search, tilt
from rlalign.kernels.alpha_search_triton import tilt_grid
from tests.kernels.cases import DEVICE
from tests.kernels.test_alpha_search import BOUND, FEW, FINE, GRID, draw, first_of_equals, flat


@pytest.mark.parametrize("share", [256, 4096])
@pytest.mark.parametrize(("rows", "vocab"), [(5, 7), (5, 1000), (2, 32003)])
def test_one_pass_gives_what_each_strength_does_alone(rows, vocab, share, monkeypatch):
    monkeypatch.setattr(alpha_search_triton, "SHARE", share)
    large, small, expert = draw(rows, vocab, dtype=torch.float32)
    large[1, 3] = -math.inf
    delta = measure(small, expert, BOUND).delta_BV
    grid = torch.tensor(GRID, device=DEVICE)
    got = tilt_grid(large, delta, grid)
    for n, alpha in enumerate([0.0, *GRID]):
        want = tilt(large.double(), delta.double(), large.new_full((rows, 1), alpha).double())[
            ..., 0
        ]
        torch.testing.assert_close(got[..., n].double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [GRID, FINE, [0.7]])
def test_the_choice_is_that_of_the_plain_search(grid):
    large, small, *experts = draw(12, 600, experts=2, dtype=torch.float32)
    moves = [measure(small, expert, BOUND) for expert in experts]
    got, want = (search(large, moves, grid, backend=name) for name in ("triton", "torch"))
    torch.testing.assert_close(got.loss_B, want.loss_B, atol=1e-5, rtol=1e-5)
    same = (got.alpha_BT == want.alpha_BT).all(-1)
    assert same.float().mean() > 0.8  # others are equally good to rounding


@pytest.mark.parametrize("kind", ["certain", "ruled out", "same ratio", "at first"])
def test_of_strengths_that_move_nothing_the_first_is_taken(kind):
    grids = [[0.3, 0.8, 1.7], FEW] if kind == "at first" else [GRID, [0.3, 0.8, 1.7]]
    large, small, expert = flat(kind, rows=6, dtype=torch.float32)
    for grid in grids:
        got = search(large, [measure(small, expert, BOUND)], grid, backend="triton").alpha_BT
        rows = zip(large, small, expert, strict=True)
        want = [grid[first_of_equals(*row, grid)] for row in rows]
        assert got[:, 0].tolist() == pytest.approx(want, abs=1e-6)
        assert set(want) == {grid[0]}
