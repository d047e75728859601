"""Lines that Python's JSON parser refuses, in whatever way, are broken rows like any other."""

from __future__ import annotations

import pytest

from rlalign.tasks.jsonl import read_lines


@pytest.mark.parametrize(
    "line", [b'{"a": ' + b"1" * 5000 + b"}", b"[" * 100_000, b"{", b"\xff", b"[1]"]
)
def test_a_line_that_cannot_be_parsed_is_a_broken_row_and_the_next_is_read(line):
    broken, fine = read_lines([line, b'{"a": 1}'])
    assert broken.value is None and broken.place == "line 1" and broken.problem
    assert fine.value == {"a": 1} and fine.place == "line 2"
