"""The search for an expert's strength against dense softmaxes in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlalign.kernels import alpha_search
from rlalign.kernels.alpha_search import bracket, divergences, fuse, measure, search, tilt
from rlalign.kernels.alpha_search_triton import COLUMNS, SHARE, STRENGTHS, tilt_kernel
from tests.kernels.cases import DEVICE
from tests.kernels.test_ahead_of_time import spilled_bytes

GRID = [round(0.1 * i, 10) for i in range(21)]
FINE = [round(0.01 * i, 10) for i in range(201)]
FEW = [0.0, 0.4, 0.9, 1.0, 1.7]
BOUND = 30.0


def draw(rows, vocab, experts=1, seed=0, dtype=torch.float64, spread=2.0):
    """Logits of the large model, the small base, and experts that moved by very little to a lot."""
    rng = torch.Generator("cpu").manual_seed(seed)
    normal = torch.randn(2 + experts, rows, vocab, generator=rng, dtype=torch.float64, device="cpu")
    moved = torch.linspace(-4, 1.2, rows, dtype=torch.float64, device="cpu").exp()[:, None]
    large, small = spread * normal[0], spread * normal[1]
    return tuple(x.to(DEVICE, dtype) for x in (large, small, *(small + moved * normal[2:])))


def kl(p, q):
    """KL of log-probs."""
    return float((p.exp() * (p - q)).sum())


def losses(large, small, experts, alphas):
    """L of one row at each tuple of strengths, straight from its definition."""
    logits = [x.double().cpu() for x in (large, small, *experts)]
    m, s, *others = (x.log_softmax(-1) for x in logits)
    out = []
    for alpha in alphas:
        p = m + sum(a * (e - s) for a, e in zip(alpha, others, strict=True))
        p = p.log_softmax(-1)
        out.append(sum((kl(p, m) - kl(e, s)) ** 2 + (kl(m, p) - kl(s, e)) ** 2 for e in others))
    return out


def one_hots(count):
    return [
        tuple(a if t == acting else 0.0 for t in range(count))
        for acting in range(count)
        for a in GRID
    ]


@pytest.mark.parametrize("vocab", [7, 1000])
def test_divergences_are_those_of_softmaxes_and_never_fall(vocab):
    large, small, expert = draw(12, vocab)
    delta = measure(small, expert, BOUND).delta_BV
    before = torch.zeros(2, 12, dtype=torch.float64)
    for alpha in (0.0, 0.3, 1.0, 2.0):
        got = divergences(large, delta, large.new_full((12,), alpha))
        for b in range(12):
            m = large[b].log_softmax(-1)
            p = (large[b] + alpha * (expert[b] - small[b])).log_softmax(-1)
            assert got[0, b] == pytest.approx(kl(p, m), abs=1e-10)
            assert got[1, b] == pytest.approx(kl(m, p), abs=1e-10)
        assert (got >= before).all() and (alpha > 0 or (got < 1e-12).all())
        before = got


def test_the_targets_are_the_experts_own_divergences():
    _, small, expert = draw(12, 300)
    move = measure(small, expert, BOUND)
    for b in range(12):
        s, e = small[b].log_softmax(-1), expert[b].log_softmax(-1)
        assert move.moved_2B[0, b] == pytest.approx(kl(e, s), abs=1e-12)
        assert move.moved_2B[1, b] == pytest.approx(kl(s, e), abs=1e-12)


@pytest.mark.parametrize("grid", [GRID, FINE, [0.3, 0.8, 1.7]])
def test_the_bracketed_minimum_is_that_of_the_whole_grid(grid):
    """On 1000 random triples."""
    parts = [
        draw(200, 24, seed=seed, spread=spread) for seed, spread in enumerate((0.5, 1, 2, 4, 8))
    ]
    large, small, expert = (torch.cat(x) for x in zip(*parts, strict=True))
    move = measure(small, expert, BOUND)
    choice = search(large, [move], grid)
    table = torch.stack(
        [
            (divergences(large, move.delta_BV, large.new_full((1000,), a)) - move.moved_2B)
            .square()
            .sum(0)
            for a in grid
        ],
        -1,
    )
    assert torch.equal(choice.alpha_BT[:, 0], large.new_tensor(grid)[table.argmin(-1)])
    torch.testing.assert_close(choice.loss_B, table.amin(-1), atol=1e-12, rtol=1e-9)


def test_a_finer_grid_is_never_worse():
    large, small, expert = draw(100, 50)
    move = measure(small, expert, BOUND)
    coarse, fine = (search(large, [move], grid).loss_B for grid in (GRID, FINE))
    assert (fine <= coarse).all() and (fine < 0.9 * coarse).any()


@given(
    st.lists(st.floats(0, 3), min_size=12, max_size=12),
    st.lists(st.floats(0, 3), min_size=2, max_size=2),
)
@settings(deadline=None, max_examples=300)
def test_a_bracket_holds_the_minimum_of_any_growing_curves(steps, target):
    """Curves with jumps and plateaus, of which it may look at any part."""
    curve_2N = torch.tensor(steps).view(2, 6).cumsum(-1)
    grid = torch.arange(1.0, 7.0)
    table = (curve_2N - torch.tensor(target)[:, None]).square().sum(0)

    def move_to(rows, alpha):
        return curve_2N[:, (alpha - 1).long()]

    first = torch.tensor([1, 2])
    loss = bracket(move_to, torch.tensor(target)[:, None], grid, first, curve_2N[:, None, first])[0]
    assert loss.min() == table.min()


def flat(kind, rows=12, vocab=40, dtype=torch.float64):
    """Logits of a large model that no strength moves; "at first": none well below 4/3,
    where another token takes over at once."""
    large, small, expert = draw(rows, vocab)
    rest = slice(5 if kind == "same ratio" else 1, None)
    large[:, rest] -= math.inf if kind == "ruled out" else 1e4
    if kind == "same ratio":  # for the five tokens it may write
        expert[:, :5] = small[:, :5] + expert[:, 5:6] - small[:, 5:6]
    if kind == "at first":
        large[:, 3], small[:, 3], expert[:, 3] = large[:, 0] - 400, -600.0, -300.0
        expert[:, 0] = small[:, 0]
    large += torch.linspace(-30, 30, rows, dtype=large.dtype, device=DEVICE)[:, None]
    return [x.to(dtype) for x in (large, small, expert)]


def first_of_equals(large, small, expert, grid):
    """The first index whose L is the smallest to rounding, by dense softmaxes in float64."""
    m, s, e = (x.double().cpu().log_softmax(-1) for x in (large, small, expert))
    may = m > -math.inf  # P_a has no other tokens
    table = []
    for a in grid:
        p = (m + a * (e - s)).log_softmax(-1)
        forward, backward = kl(p[may], m[may]) - kl(e, s), kl(m[may], p[may]) - kl(s, e)
        table.append(forward**2 + backward**2)
    return next(i for i, loss in enumerate(table) if loss <= min(table) * (1 + 1e-8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        *itertools.product(["certain", "ruled out", "same ratio"], [GRID, FINE, [1.2, 1.25]]),
        *itertools.product(["certain", "at first"], [[0.3, 0.8, 1.7], [0.0, 1.7], FEW]),
    ],
)
def test_of_strengths_that_move_nothing_the_first_is_taken(kind, grid, dtype):
    large, small, expert = flat(kind, dtype=dtype)
    move = measure(small, expert, BOUND)
    assert (move.moved_2B > 0).all()
    got = search(large, [move], grid, backend="torch").alpha_BT[:, 0]
    rows = zip(large, small, expert, strict=True)
    want = [grid[first_of_equals(*row, grid)] for row in rows]
    assert got.tolist() == pytest.approx(want, abs=1e-6)
    assert set(want) == {grid[0]}


def test_of_experts_that_move_nothing_the_first_is_taken():
    large, small, expert = flat("certain", dtype=torch.float32)
    moves = [measure(small, x, BOUND) for x in (expert, expert.flip(0))]
    for joint, want in ((False, [0.5, 0.0]), (True, [0.5, 0.5])):
        choice = search(large, moves, [0.5, 1.0, 1.5], joint=joint, backend="torch")
        assert choice.alpha_BT.tolist() == [want] * len(large)


def test_few_strengths_are_looked_at(monkeypatch):
    large, small, expert = draw(64, 500, dtype=torch.float32)
    seen = []
    monkeypatch.setattr(
        alpha_search, "tilt", lambda *args: seen.append(args[2].numel()) or tilt(*args)
    )
    search(large, [measure(small, expert, BOUND)], GRID, backend="torch")
    assert sum(seen) / 64 < 8  # of 21; strength 0 is one of them


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_expert_acts_with_the_first_minimiser(count):
    large, small, *experts = draw(30, 40, experts=count)
    moves = [measure(small, expert, BOUND) for expert in experts]
    choice = search(large, moves, GRID)
    candidates = one_hots(count)
    for b in range(30):
        table = losses(large[b], small[b], [e[b] for e in experts], candidates)
        assert tuple(choice.alpha_BT[b].tolist()) == candidates[table.index(min(table))]
        assert choice.loss_B[b] == pytest.approx(min(table), rel=1e-6, abs=1e-10)


def test_two_experts_act_jointly():
    large, small, *experts = draw(5, 30, experts=2)
    moves = [measure(small, expert, BOUND) for expert in experts]
    grid = GRID[::4]
    choice = search(large, moves, grid, joint=True)
    pairs = [(a, b) for a in grid for b in grid]
    for b in range(5):
        table = losses(large[b], small[b], [e[b] for e in experts], pairs)
        assert tuple(choice.alpha_BT[b].tolist()) == pairs[table.index(min(table))]
        assert choice.loss_B[b] == pytest.approx(min(table), rel=1e-6)
    assert (choice.alpha_BT > 0).all(-1).any()


def test_experts_in_another_order_act_alike():
    large, small, *experts = draw(40, 60, experts=3)
    moves = [measure(small, expert, BOUND) for expert in experts]
    order = [2, 0, 1]
    choice = search(large, moves, GRID)
    other = search(large, [moves[t] for t in order], GRID)
    assert torch.equal(other.alpha_BT, choice.alpha_BT[:, order])
    assert len(choice.alpha_BT.argmax(-1).unique()) == 3


def test_a_lone_expert_may_be_there_twice_but_not_one_of_several():
    """The targets are means over the experts, which a second copy of one of several moves."""
    large, small, *experts = draw(40, 60, experts=2)
    one, two = (measure(small, expert, BOUND) for expert in experts)
    for moves, twice in (([one], [one, one]), ([one, two], [one, two, one, two])):
        fused = [fuse(large, m, search(large, m, GRID).alpha_BT) for m in (moves, twice)]
        assert torch.equal(*fused)
        assert not search(large, twice, GRID).alpha_BT[:, len(moves) :].any()  # the first acts
    weighted = [
        fuse(large, m, search(large, m, GRID).alpha_BT) for m in ([one, two], [one, one, two])
    ]
    assert not torch.equal(*weighted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expert_that_is_its_base_does_nothing(dtype):
    large, small, _ = draw(20, 200, dtype=dtype)
    shifted = small + torch.linspace(-400, 400, 20)[:, None].to(small)  # rounds, in float32
    for expert in (small, shifted):
        move = measure(small, expert, BOUND)
        choice = search(large, [move], GRID)
        assert not choice.alpha_BT.any()
        assert torch.equal(fuse(large, [move], choice.alpha_BT), large)


def test_a_large_model_that_is_the_base_becomes_the_expert():
    _, small, expert = draw(50, 200)
    move = measure(small, expert, BOUND)
    choice = search(small, [move], GRID)
    assert (choice.alpha_BT == 1).all() and (choice.loss_B < 1e-12).all()
    fused = fuse(small, [move], choice.alpha_BT).log_softmax(-1)
    torch.testing.assert_close(fused, expert.log_softmax(-1))


def test_a_constant_added_to_any_logits_changes_nothing():
    large, small, expert = draw(50, 200)
    want = search(large, [measure(small, expert, BOUND)], GRID)
    for i in range(3):
        logits = [large, small, expert]
        logits[i] = logits[i] + torch.linspace(-300, 300, 50)[:, None].to(large)
        got = search(logits[0], [measure(*logits[1:], BOUND)], GRID)
        assert torch.equal(got.alpha_BT, want.alpha_BT)
        torch.testing.assert_close(got.loss_B, want.loss_B, atol=1e-9, rtol=1e-6)


def test_what_was_found_before_pins_nothing():
    """A perfect match in one call; the next one is judged for itself."""
    _, small, expert = draw(10, 50)
    search(small, [measure(small, expert, BOUND)], GRID)
    large, small, expert = draw(10, 50, seed=5)
    choice = search(large, [measure(small, expert, BOUND)], GRID)
    pinned = []
    for b in range(10):
        table = losses(large[b], small[b], [expert[b]], one_hots(1))
        assert choice.alpha_BT[b, 0] == GRID[table.index(min(table))]
        pinned.append(table[10] == min(table))
    assert not all(pinned)


@pytest.mark.parametrize("vocab", [7, 1000, 32003])
def test_float32_is_close_to_the_definition_and_rows_do_not_see_each_other(vocab, monkeypatch):
    rows = 9
    large, small, expert = draw(rows, vocab, dtype=torch.float32)
    move = measure(small, expert, BOUND)
    choice = search(large, [move], GRID)
    for b in range(rows):
        table = losses(large[b], small[b], [expert[b]], one_hots(1))
        chosen = table[round(float(choice.alpha_BT[b, 0]) / 0.1)]
        assert chosen <= min(table) + 1e-5 * max(1.0, min(table))
        assert choice.loss_B[b] == pytest.approx(chosen, rel=1e-4, abs=1e-6)
        alone = search(
            large[b : b + 1], [measure(small[b : b + 1], expert[b : b + 1], BOUND)], GRID
        )
        assert torch.equal(alone.alpha_BT[0], choice.alpha_BT[b])
    for size in (1, 2**30):
        monkeypatch.setattr(alpha_search, "BLOCK_BYTES", size)
        again = search(large, [measure(small, expert, BOUND)], GRID)
        assert torch.equal(again.alpha_BT, choice.alpha_BT)
        torch.testing.assert_close(again.loss_B, choice.loss_B, atol=1e-6, rtol=1e-5)


def test_tokens_that_are_ruled_out():
    large, small, expert = draw(4, 30)
    large[0, 3] = -math.inf  # by the large model: it stays out
    small[1, 4] = expert[1, 4] = -math.inf  # by both: nothing happens to it
    small[2, 5] = -math.inf  # by one: bounded
    expert[3, 6] = -math.inf
    move = measure(small, expert, BOUND)
    choice = search(large, [move], GRID)
    fused = fuse(large, [move], choice.alpha_BT)
    assert choice.finite_B.all() and move.bounded_B.tolist() == [0, 0, 1, 1]
    assert fused[0, 3] == -math.inf and fused[0].isfinite().sum() == 29
    assert fused[1, 4] == large[1, 4] and fused.isnan().sum() == 0
    assert move.delta_BV[2, 5] == pytest.approx(BOUND, abs=1e-6)
    assert move.delta_BV[3, 6] == pytest.approx(-BOUND, abs=1e-6)
    # Without the token the small models of row 1 say the same.
    keep = [v for v in range(30) if v != 4]
    alone = measure(small[1:2, keep], expert[1:2, keep], BOUND)
    torch.testing.assert_close(alone.moved_2B[:, 0], move.moved_2B[:, 1])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_no_distribution_stays_alone(which, value):
    logits = [x.clone() for x in draw(5, 30)]
    want = search(logits[0], [measure(*logits[1:], BOUND)], GRID)
    logits[which][2, 7] = value
    got = search(logits[0], [measure(*logits[1:], BOUND)], GRID)
    assert got.finite_B.tolist() == [True, True, False, True, True]
    others = [0, 1, 3, 4]
    assert torch.equal(got.alpha_BT[others], want.alpha_BT[others])
    assert not got.alpha_BT[2].any()


@pytest.mark.parametrize("shift", [-200.0, -104.0, -60.0, 60.0, 84.0, 200.0])
@pytest.mark.parametrize("of", [0, 1, 2], ids=["large", "small", "expert"])
def test_rows_of_any_size_among_others(of, shift, monkeypatch):
    # Sums of exponentials that leave the range of single precision, in some rows of a block.
    monkeypatch.setattr(alpha_search, "BLOCK_BYTES", 3 * 50 * 4)
    exact = draw(8, 50)
    move = measure(exact[1], exact[2], BOUND)
    rows = torch.tensor([1, 2, 4, 5, 7], device=DEVICE)
    alpha_KC = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64, device=DEVICE).repeat(5, 1)
    wanted = tilt(exact[0], move.delta_BV, alpha_KC, rows)
    rough = [x.float() for x in exact]
    rough[of][[2, 4, 6]] += shift
    found = measure(rough[1], rough[2], BOUND)
    tilted = tilt(rough[0], found.delta_BV, alpha_KC.float(), rows)
    wanted[0, [1, 2]] += shift * (of == 0)
    torch.testing.assert_close(tilted.double(), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.moved_2B.double(), move.moved_2B, rtol=1e-2, atol=1e-3)
    assert not found.bounded_B.any()


def test_probabilities_that_underflow():
    """Logits hundreds apart, which no float32 probability holds."""
    large, small, expert = draw(20, 100, dtype=torch.float32, spread=200.0)
    choice = search(large, [measure(small, expert, BOUND)], GRID)
    assert choice.loss_B.isfinite().all() and choice.finite_B.all()
    for b in range(20):
        table = losses(large[b], small[b], [expert[b]], one_hots(1))
        chosen = table[round(float(choice.alpha_BT[b, 0]) / 0.1)]
        assert chosen <= min(table) + 1e-4 * max(1.0, min(table))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_the_kernel_compiles_and_spills_nothing(capability, tmp_path):
    pointers = dict.fromkeys(("large", "delta", "alpha", "out"), "*fp32")
    constants = {"SHARE": SHARE, "BV": COLUMNS, "BA": STRENGTHS}
    names = tilt_kernel.arg_names
    signature = {x: "constexpr" if x in constants else pointers.get(x, "i32") for x in names}
    compiled = triton.compile(
        ASTSource(tilt_kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True},
    )
    assert spilled_bytes(compiled, tmp_path) == 0
