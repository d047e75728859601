"""`linear_logprob` against a float64 loop written from the formula, its limits and its errors.

Run on the torch backend here, and on the Triton backend by tests/kernels/test_interpreted.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.kernels import torch_backend
from rlalign.kernels.linear_cross_entropy import linear_cross_entropy
from rlalign.kernels.linear_logprob import LinearLogProb
from tests.kernels.cases import (
    BACKEND,
    DEVICE,
    INTERPRETED,
    assert_near,
    draw,
    gradients,
    reference,
    score,
    use_tiles,
)
from tests.kernels.watch import Watch

SHAPES = [(1, 3, 7), (33, 17, 129), (61, 64, 1003)]  # rows, width, vocabulary
OPTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "softcap": 5.0},
    {"temperature": 0.8, "softcap": 30.0, "logit_scale": 0.0625, "bias": True},
    {"bias": True, "logit_scale": 1.5},
]
OUTPUTS = ["logp", "entropy", "lse"]
HALF_OPTIONS = [{}, {"temperature": 0.8, "softcap": 30.0, "bias": True}]
# Half precision: dZ is rounded once before the products, and the result once after.
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles along every axis, as on a GPU. The last of SHAPES is aligned and read through
    descriptors, the others through pointers."""
    if BACKEND == "triton":
        from rlalign.kernels import triton_backend

        use_tiles(monkeypatch, rows=16, cols=64, depth=16, group=2, promote=3, tma=True)
        monkeypatch.setattr(triton_backend, "MIN_COLUMNS", 256)
    else:
        monkeypatch.setitem(torch_backend.TILE_SIDE, "cpu", 16)


def case(shape, options, dtype=torch.float32):
    """(hidden, weight, bias), target, upstream, options; the definition on float64 copies of the
    inputs, and those copies."""
    options = dict(options)
    *inputs, target, g, e, ell = draw(*shape, bias=options.pop("bias", False), dtype=dtype)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    return inputs, target, (g, e, ell), options, reference(*exact, target, **options), exact


def run(inputs, target, options, backend=BACKEND, **more):
    hidden, weight, bias = inputs
    more = {"return_entropy": True, "return_lse": True, "workspace_mib": 1} | more
    return score(hidden, weight, target, bias=bias, backend=backend, **options, **more)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", [BACKEND, "eager"])
def test_values_equal_the_definition(shape, options, backend):
    inputs, target, _, options, expected, _ = case(shape, options)
    actual = run(inputs, target, options, backend, chunk_size=7)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wanted", [*OUTPUTS, "all"])
def test_gradients_equal_the_definition(shape, options, wanted):
    """Upstreams differ from token to token, have either sign, and are zero for some."""
    inputs, target, upstream, options, expected, copies = case(shape, options)
    actual = run(inputs, target, options, chunk_size=7)
    used = [
        up if wanted in (name, "all") else None for name, up in zip(OUTPUTS, upstream, strict=True)
    ]
    pairs = zip(gradients(actual, used, inputs), gradients(expected, used, copies), strict=True)
    # An entropy's gradient magnifies the rounding of float32 products as libraries and GPUs make
    # them (eager torch is as far off).
    exact = wanted != "entropy" or INTERPRETED
    tolerance = 1e-6 if exact else 2e-6
    for got, want in pairs:
        assert_near(got, want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", HALF_OPTIONS, ids=str)
def test_half_precision_inputs_are_not_rounded_again(dtype, options):
    """Logits stay in fp32: values are the exact ones of the rounded inputs."""
    inputs, target, upstream, options, expected, exact = case((61, 64, 1003), options, dtype)
    actual = run(inputs, target, options)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
    wanted = gradients(expected, upstream, exact)
    for got, want in zip(gradients(actual, upstream, inputs), wanted, strict=True):
        assert got.dtype == dtype
        assert_near(got, want, TOLERANCES[dtype])


def test_the_gradients_of_a_rows_logits_add_up_to_that_of_its_lse():
    inputs, target, upstream, *_ = case((33, 17, 129), {"bias": True})
    out = run(inputs, target, {})
    (grad_V,) = gradients(out, upstream, inputs[2:])
    torch.testing.assert_close(grad_V.sum().double(), upstream[2].sum(), atol=1e-5, rtol=0)


def test_a_second_backward_over_a_retained_graph_gives_the_same_gradient():
    hidden, weight, _, target, g, e, _ = draw(20, 8, 31, bias=False, dtype=torch.float32)
    out = score(hidden, weight, target, return_entropy=True)
    loss = (out.logp * g.float()).sum() + (out.entropy * e.float()).sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("level", [-200.0, 200.0])
def test_logits_far_from_zero_keep_their_digits(level):
    hidden, weight, _, target, _, _, _ = draw(9, 6, 40, bias=False, dtype=torch.float32)
    bias = torch.full((40,), level)
    moved = score(hidden, weight, target, bias=bias, return_entropy=True)
    still = score(hidden, weight, target, return_entropy=True)
    for got, want in zip(moved[:2], still[:2], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_forbidden_token_has_no_probability_and_a_finite_gradient():
    hidden, weight, _, target, g, e, _ = draw(12, 6, 10, bias=False, dtype=torch.float32)
    bias = torch.zeros(10)
    bias[3], target[0], target[1:] = -math.inf, 3, 5
    out = score(hidden, weight, target, bias=bias, return_entropy=True)
    keep = [v for v in range(10) if v != 3]
    rest = reference(hidden[1:], weight[keep], None, torch.full((11,), 4))
    assert out.logp[0] == -math.inf
    torch.testing.assert_close(out.logp[1:].double(), rest[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(out.entropy[1:].double(), rest[1], atol=5e-6, rtol=0)
    for grad in gradients(out, (g + 1, e), (hidden, weight)):
        assert torch.isfinite(grad).all()


def test_a_head_of_nothing_but_forbidden_tokens_gives_zero_gradient():
    hidden, weight, _, target, g, e, _ = draw(3, 4, 5, bias=False, dtype=torch.float32)
    bias = torch.full((5,), -math.inf)
    out = score(hidden, weight, target, bias=bias, return_entropy=True)
    assert (out.logp == -math.inf).all() and (out.entropy == 0).all()
    grads = torch.autograd.grad([*out[:2]], [hidden, weight], [g.float(), e.float()])
    assert all((grad == 0).all() for grad in grads)


def test_ignored_rows_are_zero_and_move_nothing():
    hidden, weight, _, target, g, e, _ = draw(30, 8, 21, bias=False, dtype=torch.float32)
    target[4::3] = -100
    kept = target != -100
    out = score(hidden, weight, target, return_entropy=True, chunk_size=4)
    assert (out.logp[~kept] == 0).all() and (out.entropy[~kept] == 0).all()
    alone = score(hidden[kept], weight, target[kept], return_entropy=True)
    for got, want in zip(
        gradients(out, (g, e), (hidden, weight)),
        gradients(alone, (g[kept], e[kept]), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 4])
def test_no_scored_row_still_runs_backward_with_exact_zeros(rows):
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    out = score(hidden, weight, torch.full((rows,), -100), return_entropy=True)
    (out.logp.sum() + out.entropy.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


def test_a_target_outside_the_vocabulary_poisons_its_own_row_only():
    hidden, weight, _, target, _, _, _ = draw(4, 5, 9, bias=False, dtype=torch.float32)
    good = score(hidden, weight, target).logp
    target[1], target[2] = 9, -1
    bad = score(hidden, weight, target)
    assert torch.isnan(bad.logp[1:3]).all()
    torch.testing.assert_close(bad.logp[[0, 3]], good[[0, 3]], atol=0, rtol=0)
    (grad,) = torch.autograd.grad(bad.logp.sum(), [hidden])
    assert torch.isnan(grad[1:3]).all() and torch.isfinite(grad[[0, 3]]).all()


def test_non_finite_hidden_states_show_in_their_own_row():
    hidden, weight, _, target, _, _, _ = draw(4, 5, 9, bias=False, dtype=torch.float32)
    with torch.no_grad():
        hidden[2, 0] = math.nan
    logp = score(hidden, weight, target).logp
    assert torch.isnan(logp).tolist() == [False, False, True, False]


@pytest.mark.parametrize("backend", [BACKEND, "eager"])
def test_autocast_does_not_round_the_logits(backend):
    hidden, weight, _, target, _, _, _ = draw(8, 6, 30, bias=False, dtype=torch.float32)
    plain = score(hidden, weight, target, backend=backend).logp
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = score(hidden, weight, target, backend=backend).logp
    assert torch.equal(plain, inside)


def test_leading_dimensions_pass_through():
    hidden, weight, _, target, _, _, _ = draw(12, 6, 30, bias=False, dtype=torch.float32)
    flat = score(hidden, weight, target, return_entropy=True)
    cube = score(hidden.view(2, 3, 2, 6), weight, target.view(2, 3, 2), return_entropy=True)
    for got, want in zip(cube[:2], flat[:2], strict=True):
        assert torch.equal(got, want.view(2, 3, 2))


def test_the_module_is_the_head_it_was_built_from():
    head = torch.nn.Linear(6, 30)
    module = LinearLogProb(head, logit_scale=0.5, softcap=4.0)
    assert module.weight is head.weight and module.bias is head.bias
    hidden, target = torch.randn(5, 6), torch.randint(0, 30, (5,))
    expected = torch.log_softmax(4 * torch.tanh(0.5 * head(hidden) / 4) / 0.9, -1)
    expected = expected.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(module(hidden, target, 0.9).logp, expected)


def test_an_entropy_for_information_only_moves_nothing():
    hidden, weight, _, target, g, _, _ = draw(9, 8, 40, bias=False, dtype=torch.float32)
    out = score(hidden, weight, target, return_entropy=True, entropy_grad=False)
    both = score(hidden, weight, target, return_entropy=True)
    assert out.entropy is not None and not out.entropy.requires_grad
    assert torch.equal(out.entropy, both.entropy)
    pairs = (gradients(x, (up, 0 * g), (hidden, weight)) for x, up in ((both, g), (out, g)))
    for got, want in zip(*pairs, strict=True):
        assert_near(got, want, 1e-6)


def test_cross_entropy_is_the_negative_log_prob_under_the_names_of_another_library():
    hidden, weight, bias, target, *_ = draw(9, 8, 40, bias=True, dtype=torch.float32)
    target[2::4] = -100
    logits = 5 * torch.tanh((hidden @ weight.T + bias) / 5)
    for reduction in ("mean", "sum", "none"):
        want = torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
        got = linear_cross_entropy(
            hidden, weight, target, bias, softcap=5.0, reduction=reduction, backend=BACKEND
        )
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="unknown reduction 'men'"):
        linear_cross_entropy(hidden, weight, target, reduction="men")
    with pytest.raises(ValueError, match="filter_eps must be a number, 'auto' or None"):
        linear_cross_entropy(hidden, weight, target, filter_eps="high")


BAD = [
    (dict(hidden=torch.zeros(3, 5)), "hidden has last dim 5, weight expects 4"),
    (dict(target=torch.zeros(2, dtype=torch.long)), "target shape (2,) does not match"),
    (dict(target=torch.zeros(3)), "target has dtype"),
    (dict(temperature=0.0), "temperature must be finite and > 0"),
    (dict(temperature=math.inf), "temperature must be finite and > 0"),
    (dict(softcap=0.0), "softcap must be > 0"),
    (dict(bias=torch.zeros(6)), "bias has 6 entries, weight has 7 rows"),
    (dict(chunk_size=0), "chunk_size must be >= 1"),
    (dict(backend="tritn"), "unknown backend 'tritn'"),
    (dict(backward="fussed"), "unknown backward 'fussed'"),
    (dict(backward="workspace", filter_hidden_grad=True), "use 'fused' or 'auto'"),
    (dict(filter_eps=0.1), "filter_eps needs filter_hidden_grad=True or"),
    (dict(filter_eps=-1.0, filter_weight_grad=True), "filter_eps must be finite and >= 0"),
    (dict(filter_weight_grad=True, return_entropy=True), "biased for entropy gradients"),
    (dict(backward="fused", backend="torch"), "needs backend 'triton', not 'torch'"),
    (dict(filter_weight_grad=True, backend="eager"), "needs backend 'triton', not 'eager'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(
        hidden=torch.zeros(3, 4), weight=torch.zeros(7, 4), target=torch.zeros(3, dtype=torch.long)
    )
    with pytest.raises(ValueError) as error:
        score(**{**arguments, **change})
    assert message in str(error.value)


def test_a_partitioned_head_is_refused():
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        score(torch.zeros(3, 4), torch.zeros(0), torch.zeros(3, dtype=torch.long))


def test_double_backward_is_refused():
    hidden, weight, _, target, _, _, _ = draw(4, 5, 9, bias=False, dtype=torch.float32)
    out = score(hidden, weight, target).logp.square().sum()
    (first,) = torch.autograd.grad(out, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(first.sum(), [hidden])


def test_a_frozen_head_gets_no_gradient_buffer():
    hidden, weight, _, target, _, _, _ = draw(6, 8, 400, bias=False, dtype=torch.float32)
    shapes = set()

    def seen(tensor):
        if tensor.data_ptr() != weight.data_ptr():
            shapes.add(tuple(tensor.shape))

    for wanted in (True, False):
        weight.requires_grad_(wanted)
        shapes.clear()
        logp = score(hidden, weight, target, chunk_size=2).logp
        with Watch(seen):
            torch.autograd.grad(logp.sum(), [hidden])
        assert ((400, 8) in shapes) == wanted
