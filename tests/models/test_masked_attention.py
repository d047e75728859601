"""Positions, masks and block borders against loops over single tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign.models.masked_attention import (
    KV,
    blocks_end,
    positions,
    sources,
    visible,
    whole_blocks,
)

ROWS = st.lists(st.booleans(), min_size=7, max_size=7)
CANVASES = st.lists(ROWS, min_size=1, max_size=3)


def blocks(row, size):
    """The block of each real token, None at padding: the n-th real token is in block n // size."""
    out, count = [], 0
    for real in row:
        out.append(count // size if real else None)
        count += real
    return out


@given(CANVASES)
def test_positions_count_real_tokens(rows):
    position_BT = positions(torch.tensor(rows))
    for row, position_T in zip(rows, position_BT.tolist(), strict=True):
        assert [p for p, real in zip(position_T, row, strict=True) if real] == list(range(sum(row)))


@given(CANVASES)
def test_a_source_is_the_real_token_before_or_the_column_itself(rows):
    for row, source_T in zip(rows, sources(torch.tensor(rows)).tolist(), strict=True):
        for column, source in enumerate(source_T):
            before = [i for i in range(column) if row[i]]
            assert source == (before[-1] if before else column)


@given(CANVASES, st.integers(1, 4), st.integers(0, 6), st.integers(1, 7))
def test_a_real_token_sees_the_real_ones_of_its_block_and_earlier_ones(rows, size, begin, end):
    begin, end = min(begin, end - 1), end
    seen = visible(torch.tensor(rows), size, begin, end)
    assert seen.shape == (len(rows), 1, end - begin, end)
    assert seen.any(-1).all()  # padding too
    for row, seen_QK in zip(rows, seen[:, 0].tolist(), strict=True):
        block = blocks(row, size)
        for q in range(begin, end):
            if row[q]:
                expected = [row[k] and block[k] <= block[q] for k in range(end)]
                assert seen_QK[q - begin] == expected


@given(CANVASES)
def test_without_blocks_every_token_sees_all_real_ones(rows):
    seen = visible(torch.tensor(rows), 0, 2, 7)
    for row, seen_K in zip(rows, seen[:, 0, 0].tolist(), strict=True):
        assert seen_K == (row if any(row) else [True] * 7)


@given(CANVASES, st.integers(1, 4), st.integers(0, 7))
def test_whole_blocks_are_all_that_nothing_later_belongs_to(rows, size, stop):
    """Up to there no block goes on from `stop`, and the next column would be of one, or is
    `stop`."""

    def goes_on(column):
        return any(
            row[column] and blocks(row, size)[column] in blocks(row, size)[stop:] for row in rows
        )

    kept = whole_blocks(torch.tensor(rows), size, stop)
    assert 0 <= kept <= stop
    assert not any(goes_on(column) for column in range(kept))
    assert kept == stop or goes_on(kept)


@given(CANVASES, st.integers(1, 4), st.integers(1, 7))
def test_the_end_of_blocks_is_the_last_column_that_any_column_before_sees(rows, size, stop):
    end = blocks_end(torch.tensor(rows), size, stop)
    needed = stop
    for row in rows:
        block = blocks(row, size)
        last = [b for b in block[:stop] if b is not None]
        if last:
            needed = max(needed, 1 + max(i for i in range(7) if row[i] and block[i] <= last[-1]))
    assert end == needed


def test_keys_and_values_of_rows_and_columns():
    key = torch.arange(24.0).view(2, 1, 4, 3)
    kv = KV(((key, -key),) * 2)
    assert (len(kv), len(KV())) == (4, 0)
    chosen = kv.rows(torch.tensor([1, 1, 0])).columns(2)
    assert len(chosen) == 2
    for k, v in chosen.layers:
        assert torch.equal(k, key[[1, 1, 0], :, :2]) and torch.equal(v, -k)


@pytest.mark.parametrize("stop", [0, 4])
def test_no_columns_and_all_columns(stop):
    kv = KV(((torch.zeros(1, 1, 4, 2),) * 2,))
    assert len(kv.columns(stop)) == stop
