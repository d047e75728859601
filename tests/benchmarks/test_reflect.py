"""Figures of the reflection benchmark; no bar holds by construction."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("shapely")

import rlalign.testtime.reflect_sudoku as reflect_sudoku
from benchmarks import reflect
from tests.testtime.rules import RulesModel


def test_the_share_of_scenes_that_reflection_makes_worse():
    planner = np.array([50.0, 80.0, 0.0, 100.0])
    assert reflect.worse_share(np.array([49.0, 90.0, 0.0, 100.0 - 1e-12]), planner) == 25
    assert reflect.worse_share(planner, planner) == 0


def test_sudoku_s_rows_tell_what_became_worse_and_its_bar_is_about_solving(monkeypatch):
    monkeypatch.setattr(reflect_sudoku, "load_sudoku_model", lambda **_: RulesModel())
    rows, bars = reflect.sudoku(3)
    assert all(row["worse than the draft"] == 0 for row in rows)
    assert [bar["what"] for bar in bars] == ["sudoku: solved, 12 blanks in 2 steps"]
