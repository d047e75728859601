"""Norms of per-segment gradients of the head against one backward pass each, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlalign.kernels import torch_backend
from rlalign.kernels.gradient_norms import InputSide, head_gradient_norms
from rlalign.kernels.linear_logprob import Lora
from tests.kernels.cases import DEVICE
from tests.kernels.watch import Watch

V, SEGMENTS = 50, 7
WIDE, NARROW = 40, 5  # more and less than a segment has tokens: the two ways to the norm
WIDTHS = pytest.mark.parametrize("width", [WIDE, NARROW], ids=["products", "slices"])


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    target: Tensor
    segment: Tensor
    options: dict

    def norms(self, **changes) -> Tensor:
        arguments = (self.hidden, self.weight, self.target, self.segment, SEGMENTS)
        return head_gradient_norms(*arguments, **(self.options | changes))


def draw(width: int, dtype=torch.float64, tokens: int = 70, **options) -> Case:
    """Tokens of interleaved segments of 4 to 20 tokens, some of none (-1); the last segment is
    empty. Every third token has the same target."""
    rng = torch.Generator("cpu").manual_seed(width)
    of = {"generator": rng, "device": "cpu"}

    def normal(*shape):
        return torch.randn(*shape, **of, dtype=torch.float64).to(DEVICE, dtype)

    shares = torch.tensor([1.0, 1, 2, 3, 4, 5, 1], device="cpu")
    segment = torch.multinomial(shares, tokens, replacement=True, generator=rng) - 1
    target = torch.randint(0, V, (tokens,), **of)
    target[::3] = 4
    for name, make in {
        "bias": lambda: normal(V),
        "lora": lambda: Lora(normal(tokens, 3), 0.3 * normal(V, 3)),
        "token_weight": lambda: normal(tokens),
    }.items():
        if options.pop(name, False):
            options[name] = make()
    weight = 2 / math.sqrt(width) * normal(V, width)
    return Case(1.5 * normal(tokens, width), weight, target.to(DEVICE), segment, options)


def gradients(case: Case, side: InputSide | None = None) -> Tensor:
    """[J, V, D] by autograd, segment after segment, in float64."""
    options = dict(case.options)
    lora, bias, cap = options.get("lora"), options.get("bias"), options.get("softcap")
    weight_of = options.get("token_weight", torch.ones(len(case.target), device=DEVICE))
    result = []
    for j in range(SEGMENTS):
        weight = case.weight.double().requires_grad_()
        total = weight.sum() * 0
        for n in (case.segment == j).nonzero()[:, 0].tolist():
            u = weight @ case.hidden[n].double()
            if lora is not None:
                u = u + lora.weight.double() @ lora.hidden[n].double()
            if bias is not None:
                u = u + bias.double()
            u = u * options.get("logit_scale", 1.0)
            z = (u if cap is None else cap * torch.tanh(u / cap)) / options.get("temperature", 1.0)
            z = z[: options.get("vocab_size", V)]
            total = total + weight_of[n].double() * (z[case.target[n]] - z.logsumexp(0))
        grad = torch.autograd.grad(total, weight)[0].clone()
        if side is not None:
            for row, segment, vector in zip(*side, strict=True):
                grad[row] += vector.double() * (segment == j)
        result.append(grad)
    return torch.stack(result)


def norms(grads: Tensor) -> Tensor:
    return grads.flatten(1).norm(dim=1)


def assert_near(found: Tensor, want: Tensor, relative: float) -> None:
    error = (found.double() - want).abs() / want.clamp(min=1e-300)
    assert float(torch.where(want == 0, found.double().abs(), error).max()) <= relative


OPTIONS = {
    "plain": {},
    "temperature and scale": dict(temperature=0.6, logit_scale=0.7),
    "bias": dict(bias=True, temperature=1.4),
    "softcap": dict(softcap=3.0, temperature=0.7, logit_scale=1.3),
    "adapter": dict(lora=True, temperature=0.7),
    "padded vocabulary": dict(vocab_size=37, bias=True),
    "token weights": dict(token_weight=True, temperature=0.7),
    "all": dict(
        bias=True, softcap=2.0, lora=True, temperature=0.7, token_weight=True, vocab_size=45
    ),
}


@WIDTHS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_norms_equal_those_of_single_backward_passes(options, width):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        case = draw(width, dtype, **options)
        case.target.clamp_(max=options.get("vocab_size", V) - 1)
        found = case.norms()
        assert found.dtype == dtype
        assert_near(found, norms(gradients(case)), tolerance)


@WIDTHS
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
def test_the_input_side_of_a_tied_weight_joins_the_norm(options, width):
    """Cross term included: rows that are targets too, rows that are not, a segment with an input
    side only, one without; padding of the vocabulary has an input side only."""
    case = draw(width, **options)
    case.target.clamp_(max=options.get("vocab_size", V) - 1)
    of = {"generator": torch.Generator("cpu").manual_seed(1), "device": "cpu"}
    pairs = torch.randperm((SEGMENTS - 2) * V, **of)[:40]
    ends = torch.tensor([4, (SEGMENTS - 1) * V + 4], device="cpu")  # (segment, row) as one number
    pairs = torch.cat([pairs, ends]).unique()
    grad = torch.randn(len(pairs), width, **of, dtype=torch.float64)
    side = InputSide((pairs % V).to(DEVICE), pairs // V, grad.to(DEVICE))
    assert 5 not in side.segment and 6 in side.segment and 6 not in case.segment
    want = norms(gradients(case, side))
    assert_near(case.norms(input_side=side), want, 1e-10)
    assert (want[:5] - norms(gradients(case))[:5]).abs().min() > 1e-3
    nothing = InputSide(side.row[:0], side.segment[:0], side.grad[:0])
    assert torch.equal(case.norms(input_side=nothing), case.norms())


@WIDTHS
def test_the_norm_of_a_mean_gradient(width):
    """Of k samples: one segment, 1 / k for each token. It is not the mean of the norms."""
    samples = draw(width)
    set_of = torch.tensor([0, 0, 1, 1, 1, -1, 1], device="cpu")  # sample -> set
    count = torch.tensor([2.0, 4.0], device="cpu")
    inside = samples.segment >= 0
    sets = torch.where(inside, set_of[samples.segment], -1)
    share = torch.where(sets >= 0, 1 / count.double()[sets], 7.0)
    found = samples._replace(segment=sets).norms(token_weight=share.to(DEVICE))
    grads = gradients(samples)
    for k in (0, 1):
        mean = grads[set_of == k].mean(0).norm()
        assert found[k] == pytest.approx(float(mean), rel=1e-10)
        assert mean < 0.95 * norms(grads)[set_of == k].mean()
    assert not found[2:].any()


@WIDTHS
def test_a_sum_over_tokens_and_no_mean(width):
    """The same tokens twice: twice the gradient."""
    case = draw(width)
    hidden, target, segment = (torch.cat([x, x]) for x in (case.hidden, case.target, case.segment))
    twice = case._replace(hidden=hidden, target=target, segment=segment)
    assert_near(twice.norms(), 2 * case.norms(), 1e-12)


@WIDTHS
def test_tiles_and_order_do_not_change_anything(width, monkeypatch):
    for options in ({}, OPTIONS["all"]):
        case = draw(width, **options)
        case.target.clamp_(max=options.get("vocab_size", V) - 1)
        whole = case.norms()
        for chunk, side in ((1, 1), (7, 10), (30, 16), (1000, 64)):
            monkeypatch.setitem(torch_backend.TILE_SIDE, DEVICE, side)
            assert_near(case.norms(chunk_size=chunk), whole, 1e-12)
            assert_near(case.norms(), whole, 1e-12)
        order = torch.randperm(70, device="cpu")
        on = order.to(DEVICE)
        options = {
            name: Lora(value.hidden[on], value.weight)
            if name == "lora"
            else (value[on] if name == "token_weight" else value)
            for name, value in case.options.items()
        }
        moved = Case(case.hidden[on], case.weight, case.target[on], case.segment[order], options)
        assert_near(moved.norms(), whole, 1e-12)


@WIDTHS
def test_half_precision_inputs_are_summed_in_float32(width):
    case = draw(width, torch.bfloat16, bias=True, softcap=4.0)
    found = case.norms()
    assert found.dtype == torch.float32
    assert_near(found, norms(gradients(case)), 1e-5)


def test_a_policy_that_is_almost_certain_keeps_its_digits():
    """1 - p is 1e-3 to 1e-6 for every token: 1 - 2 p + p . p in float32 would be noise."""
    case = draw(WIDE, torch.float32)
    sure = 14 * torch.nn.functional.normalize(torch.randn(V, WIDE), dim=1).to(DEVICE)
    case = case._replace(hidden=sure[case.target] / 10, weight=sure)
    want = norms(gradients(case))
    assert 0 < want[:6].max() < 1e-2
    assert_near(case.norms(), want, 1e-5)


def test_nothing_as_large_as_the_gradient_or_the_logits_is_made(monkeypatch):
    """A tile is the largest, besides the hidden states and the inner products of tokens."""
    n, d, v, side = 400, 8, 3000, 32
    for length in (4, 50):  # by products, by slices
        sizes: list[int] = []
        monkeypatch.setitem(torch_backend.TILE_SIDE, DEVICE, side)
        hidden, weight = torch.randn(n, d, device=DEVICE), torch.randn(v, d, device=DEVICE)
        target = torch.randint(0, v, (n,)).to(DEVICE)
        with Watch(lambda x, sizes=sizes: sizes.append(x.numel())):
            head_gradient_norms(hidden, weight, target, torch.arange(n) // length, n // length)
        assert max(x for x in sizes if x != v * d) <= max(n * d, 2 * 50 * side, 2 * side**2)
        assert n * d < v * d / 4


@WIDTHS
def test_what_is_not_finite_stays_in_its_segment(width):
    case = draw(width, torch.float32)
    whole = case.norms()
    first = {j: int((case.segment == j).nonzero()[0, 0]) for j in (1, 2)}
    for change in ("hidden", "target"):
        value = getattr(case, change).clone()
        value[first[1]] = math.nan if change == "hidden" else V
        found = case._replace(**{change: value}).norms()
        assert torch.isnan(found).tolist() == [j == 1 for j in range(SEGMENTS)]
        others = [j for j in range(SEGMENTS) if j != 1]
        assert torch.equal(found[others], whole[others])


@WIDTHS
def test_forbidden_tokens(width):
    """A bias of -inf: for a token that nobody chose, for one that was chosen (its gradient is
    finite), and for all (there is nothing to move)."""
    case = draw(width, bias=True)
    case.options["bias"][9] = -math.inf
    case.target[case.target == 9] = 8
    want = gradients(case)
    assert torch.isfinite(want).all()
    assert_near(case.norms(), norms(want), 1e-10)
    case.target[(case.segment == 1).nonzero()[0, 0]] = 9
    found = case.norms()
    assert torch.isfinite(found).all() and found[1] > 0
    case.options["bias"][:] = -math.inf
    assert not case.norms().any()


def test_no_tokens():
    case = draw(WIDE)
    empty = case._replace(hidden=case.hidden[:0], target=case.target[:0], segment=case.segment[:0])
    assert empty.norms().tolist() == [0.0] * SEGMENTS
    nowhere = case._replace(segment=torch.full_like(case.segment, -1))
    assert nowhere.norms().tolist() == [0.0] * SEGMENTS


def test_arguments_that_do_not_fit():
    case = draw(WIDE)
    with pytest.raises(ValueError, match="a segment is 7, there are 7"):
        case._replace(segment=case.segment.clamp(min=7)).norms()
    with pytest.raises(ValueError, match=r"segment has shape \(69,\), target \(70,\)"):
        case._replace(segment=case.segment[1:]).norms()
    with pytest.raises(ValueError, match="temperature must be finite"):
        case.norms(temperature=0.0)
