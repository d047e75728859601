"""What holds for the Triton backend only; run by test_interpreted.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlalign.kernels import triton_backend
from rlalign.kernels.linear_logprob import Lora
from rlalign.kernels.partials import Partials, merge
from tests.kernels.cases import assert_near, draw, gradients, score, use_tiles
from tests.kernels.split_head import RANK, V, adapter


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch, rows=16, cols=32, depth=16, group=2)
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
    use_tiles(monkeypatch, tma=True)
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
    assert columns(2 * 8192, 131072, 256 << 20) == 16384
    assert columns(2 << 20, 131072, 256 << 20) == triton_backend.MIN_COLUMNS
    assert columns(4 * 64, 5000, 256 << 20) == 5000


def test_a_row_does_not_depend_on_the_others_to_the_last_bit():
    hidden, weight, _, target, *_ = draw(70, 24, 900, bias=False, dtype=torch.float32)
    options = {"return_entropy": True, "batch_invariant": True}
    whole = score(hidden, weight, target, **options)
    for rows in (slice(0, 1), slice(3, 40), slice(16, 70)):
        part = score(hidden[rows], weight, target[rows], **options)
        assert torch.equal(part.logp, whole.logp[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])


def test_more_rows_than_fit_the_splits_share_the_vocabulary_less(monkeypatch):
    tiles = use_tiles(monkeypatch)
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


# --- the fused backward --------------------------------------------------------------------------

FUSED_OPTIONS = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3, "return_lse": True}


@pytest.mark.parametrize(
    ("entropy", "tma", "dtype", "near"),
    [
        (False, False, torch.float32, 1e-6),
        (True, True, torch.float32, 1e-6),
        (True, False, torch.bfloat16, 1e-2),  # which the interpreter cuts off, not rounds
    ],
)
def test_the_fused_backward_gives_what_the_workspace_does(entropy, tma, dtype, near, monkeypatch):
    """With everything a head can have, several ranges of columns, and ragged edges."""
    use_tiles(monkeypatch, tma=tma)
    hidden, weight, bias, target, *upstream = draw(37, 24, V, bias=True, dtype=dtype)
    b_VR = adapter()[1].detach().to(dtype).requires_grad_()
    low = torch.randn(37, RANK, generator=torch.Generator().manual_seed(3)).to(dtype)
    low.requires_grad_()
    inputs = (hidden, weight, bias, low, b_VR)
    upstream = [up for up, used in zip(upstream, (True, entropy, True), strict=True) if used]
    monkeypatch.setattr(triton_backend, "workspace_columns", lambda *_: 96)
    results = []
    for backward in ("fused", "workspace"):
        out = score(
            hidden, weight, target % 290, bias=bias, lora=Lora(low, b_VR), vocab_size=290,
            return_entropy=entropy, backward=backward, **FUSED_OPTIONS,
        )  # fmt: skip
        results.append(gradients([x for x in out if x is not None], upstream, inputs))
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        assert_near(got, want, near)
    assert (results[0][1][290:] == 0).all()


def test_the_fused_backward_makes_no_gradient_of_a_frozen_head():
    hidden, weight, _, target, g, *_ = draw(37, 24, V, bias=False, dtype=torch.float32)
    [both, _] = gradients(score(hidden, weight, target, backward="fused"), [g], (hidden, weight))
    frozen = score(hidden, weight.detach(), target, backward="fused")
    [alone] = gradients(frozen, [g], (hidden,))
    torch.testing.assert_close(alone, both, atol=1e-6, rtol=1e-6)


def peaked(rows=48, width=16, vocab=350):
    """A head whose probabilities lie on few columns, far apart, and a target for each row."""
    hidden, weight, bias, target, g, _, ell = draw(
        rows, width, vocab, bias=True, dtype=torch.float32
    )
    likely = torch.arange(0, vocab, 47)
    with torch.no_grad():
        bias[likely] += 8
    return hidden, weight, bias, likely[target % len(likely)], g, ell


def test_filtering_with_eps_0_leaves_nothing_out():
    hidden, weight, bias, target, g, ell = peaked()
    inputs, options = (hidden, weight, bias), {"bias": bias, "return_lse": True}
    exact = gradients(score(hidden, weight, target, **options)[::2], [g, ell], inputs)
    out = score(
        hidden, weight, target, filter_eps=0.0, filter_hidden_grad=True, filter_weight_grad=True,
        **options,
    )  # fmt: skip
    for got, want in zip(gradients(out[::2], [g, ell], inputs), exact, strict=True):
        assert_near(got, want, 1e-6)


def test_filtering_leaves_out_every_tile_that_is_small_as_a_whole(monkeypatch):
    """Against the gradient whose small tiles, in the kernel's order of columns, are set to 0."""
    hidden, weight, bias, target, g, _ = peaked()
    tiles, eps = use_tiles(monkeypatch), 0.02
    active = g != 0
    order = (weight @ hidden[active].mean(0) + bias).argsort()
    p = (hidden @ weight.T + bias).softmax(1)
    chosen = torch.zeros_like(p).scatter_(1, target[:, None], 1)
    grad = (g[:, None] * (chosen - p)).float()[active].detach()
    most = torch.where(chosen > 0, torch.inf, g.abs()[:, None] * p)[active]
    kept = torch.zeros_like(grad)
    threshold = eps * g[active].abs().median()
    tile_count = 0
    for rows in torch.arange(len(grad)).split(tiles.rows):
        for cols in order.split(tiles.cols):
            at = (rows[:, None], cols[None, :])
            if bool(most[at].max() >= threshold):
                kept[at] = grad[at]
                tile_count += 1
    blocks = len(grad) / tiles.rows
    assert 1.5 * blocks < tile_count < 0.5 * blocks * len(order) / tiles.cols
    out = score(
        hidden, weight, target, bias=bias, filter_eps=eps, filter_hidden_grad=True,
        filter_weight_grad=True,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = gradients([out.logp], [g], (hidden, weight, bias))
    assert_near(d_hidden[active], kept @ weight, 1e-5)
    assert_near(d_weight, kept.T @ hidden[active], 1e-5)
    assert_near(d_bias, kept.sum(0), 1e-5)


def test_filtering_one_gradient_leaves_the_other_exact():
    hidden, weight, bias, target, g, _ = peaked()
    inputs = (hidden, weight, bias)
    exact = gradients([score(hidden, weight, target, bias=bias).logp], [g], inputs)
    for flag, kept in (("filter_hidden_grad", 1), ("filter_weight_grad", 0)):
        out = score(hidden, weight, target, bias=bias, filter_eps=0.5, **{flag: True})
        grads = gradients([out.logp], [g], inputs)
        assert_near(grads[kept], exact[kept], 1e-6)
        assert (grads[1 - kept] - exact[1 - kept]).norm() > 1e-4 * exact[1 - kept].norm()


def test_a_target_is_never_left_out_and_a_nan_never_hidden():
    hidden, weight, bias, target, g, _ = peaked()
    options = {"bias": bias, "filter_eps": 1e9, "filter_hidden_grad": True}
    [d_bias] = gradients(
        [score(hidden, weight, target, filter_weight_grad=True, **options).logp], [g], [bias]
    )
    assert (d_bias[target[g != 0]] != 0).all()
    bad = hidden.detach().clone()
    bad[7, 3] = torch.nan
    bad.requires_grad_()
    [d_hidden] = gradients([score(bad, weight, target, **options).logp], [g], [bad])
    assert torch.isnan(d_hidden[7]).all()


def test_fused_and_deterministic_exclude_each_other():
    hidden, weight, _, target, *_ = draw(3, 8, 20, bias=False, dtype=torch.float32)
    with pytest.raises(ValueError, match="it is not deterministic"):
        score(hidden, weight, target, backward="fused", deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="it is not deterministic"):
            score(hidden, weight, target, filter_weight_grad=True)
        score(hidden, weight, target, backward="fused", deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
