"""What holds for the Triton backend only; run by test_interpreted.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlalign.kernels import triton_backend
from rlalign.kernels.partials import Partials, merge
from tests.kernels.cases import draw, gradients, score


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    tiles = triton_backend.Tiles(16, 32, 16, 4, 1, group=2)
    monkeypatch.setattr(triton_backend, "INTERPRETER_TILES", tiles)
    monkeypatch.setattr(triton_backend, "MIN_COLUMNS", 32)


def test_the_workspace_decides_memory_and_nothing_else(monkeypatch):
    hidden, weight, bias, target, *upstream = draw(29, 24, 700, bias=True, dtype=torch.float32)
    results = []
    for columns in (32, 256, 700):
        monkeypatch.setattr(triton_backend, "workspace_columns", lambda *_, c=columns: c)
        out = score(hidden, weight, target, bias=bias, return_entropy=True)
        results.append(gradients(out, upstream[:2], (hidden, weight, bias)))
    for d_hidden, d_weight, d_bias in results[1:]:
        torch.testing.assert_close(d_hidden, results[0][0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(d_weight, results[0][1], atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(d_bias, results[0][2], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("width", "used"), [(24, True), (23, False)])
def test_aligned_matrices_are_read_through_descriptors(width, used, monkeypatch):
    tiles = triton_backend.INTERPRETER_TILES._replace(tma=True)
    monkeypatch.setattr(triton_backend, "INTERPRETER_TILES", tiles)
    hidden, weight, _, target, *_ = draw(20, width, 70, bias=False, dtype=torch.float32)
    calls = []
    described = triton_backend._described
    monkeypatch.setattr(
        triton_backend, "_described", lambda *args: calls.append(args) or described(*args)
    )
    score(hidden, weight, target)
    assert bool(calls) == used


def test_the_workspace_is_as_wide_as_fits():
    columns = triton_backend.workspace_columns
    assert columns(8192, 131072, torch.bfloat16, 256 << 20) == 16384
    assert columns(1 << 20, 131072, torch.bfloat16, 256 << 20) == triton_backend.MIN_COLUMNS
    assert columns(64, 5000, torch.float32, 256 << 20) == 5000


def test_a_row_does_not_depend_on_the_others_to_the_last_bit():
    hidden, weight, _, target, *_ = draw(70, 24, 900, bias=False, dtype=torch.float32)
    options = {"return_entropy": True, "batch_invariant": True}
    whole = score(hidden, weight, target, **options)
    for rows in (slice(0, 1), slice(3, 40), slice(16, 70)):
        part = score(hidden[rows], weight, target[rows], **options)
        assert torch.equal(part.logp, whole.logp[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])


def test_more_rows_than_fit_the_splits_share_the_vocabulary_less():
    tiles = triton_backend.INTERPRETER_TILES
    splits = [
        triton_backend._splits(torch.empty(rows, 1), 10_000, tiles, False)
        for rows in (1, 16, 64, 1000)
    ]
    assert splits == sorted(splits, reverse=True) and splits[0] > 1 and splits[-1] == 1


def test_statistics_merge_in_any_order_and_empty_parts_add_nothing():
    rng = torch.Generator().manual_seed(0)
    z = 50 * torch.randn(6, 40, generator=rng, dtype=torch.float64)
    parts = []
    for piece in (z[:, :7], z[:, 7:8], z[:, 8:]):
        top = piece.amax(1)
        e = (piece - top[:, None]).exp()
        parts.append((top, e.sum(1), (e * (piece - top[:, None])).sum(1), piece[:, 0]))
    none = (torch.full((6,), -torch.inf, dtype=torch.float64), *torch.zeros(3, 6).double())
    p = z.softmax(1)
    for order in itertools.permutations([*parts, none]):
        whole = merge(Partials(*(torch.stack(column) for column in zip(*order, strict=True))))
        torch.testing.assert_close(whole.max + whole.sum.log(), z.logsumexp(1), rtol=1e-13, atol=0)
        mean = whole.max + whole.moment / whole.sum
        torch.testing.assert_close(mean, (p * z).sum(1), rtol=1e-12, atol=0)
    nothing = merge(Partials(*(torch.stack([x, x]) for x in none)))
    assert (nothing.max == -torch.inf).all() and (nothing.sum == 0).all()
