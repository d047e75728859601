"""The chunked head against a float64 loop written from the formula, its limits and its errors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from rlalign.kernels import torch_backend
from rlalign.kernels.linear_logprob import LinearLogProb, linear_logprob
from tests.kernels.watch import Watch

SHAPES = [(1, 3, 7), (33, 17, 129), (61, 65, 1003)]
OPTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "softcap": 5.0},
    {"temperature": 0.8, "softcap": 30.0, "logit_scale": 0.0625, "bias": True},
    {"bias": True, "logit_scale": 1.5},
]


def draw(n: int, d: int, v: int, *, bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng, dtype=torch.float64)
    weight = torch.randn(v, d, generator=rng, dtype=torch.float64) * 2 / math.sqrt(d)
    bias_v = torch.randn(v, generator=rng, dtype=torch.float64) if bias else None
    target = torch.randint(0, v, (n,), generator=rng)
    g = torch.randn(n, generator=rng, dtype=torch.float64)
    e = torch.randn(n, generator=rng, dtype=torch.float64)
    g[::3], e[1::4] = 0, 0  # clipped tokens beside tokens of either sign
    tensors = [None if x is None else x.to(dtype) for x in (hidden, weight, bias_v)]
    return *[None if x is None else x.requires_grad_() for x in tensors], target, g, e


def reference(hidden, weight, bias, target, temperature=1.0, softcap=None, logit_scale=1.0):
    """Token by token, straight from the definition, in float64."""
    logps, entropies = [], []
    for n in range(len(target)):
        u = weight.double() @ hidden[n].double()
        u = logit_scale * (u if bias is None else u + bias.double())
        z = (u if softcap is None else softcap * torch.tanh(u / softcap)) / temperature
        p = z.exp() / z.exp().sum()
        logps.append(p[target[n]].log())
        entropies.append(-(p * p.log()).sum())
    return torch.stack(logps), torch.stack(entropies)


def gradients(outputs, upstream, inputs):
    total = sum((out.double() * up).sum() for out, up in zip(outputs, upstream, strict=False))
    return torch.autograd.grad(total, [x for x in inputs if x is not None])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("upstream", ["logp", "entropy", "both"])
def test_values_and_gradients_equal_the_definition(shape, options, backend, upstream):
    options = dict(options)
    n, d, v = shape
    draws = draw(n, d, v, bias=options.pop("bias", False), dtype=torch.float32)
    hidden, weight, bias, target, g, e = draws
    expected = reference(hidden, weight, bias, target, **options)
    actual = linear_logprob(
        hidden, weight, target, bias=bias, return_entropy=True, chunk_size=7, backend=backend,
        **options,
    )  # fmt: skip
    for got, want in zip(actual[:2], expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=1e-6)
    pick = {"logp": slice(0, 1), "entropy": slice(1, 2), "both": slice(0, 2)}[upstream]
    inputs, ups = (hidden, weight, bias), (g, e)[pick]
    tolerance = 2e-6 if backend == "torch" else 5e-5  # autograd cancels digits of the entropy
    wanted = gradients(expected[pick], ups, inputs)
    for got, want in zip(gradients(actual[pick], ups, inputs), wanted, strict=True):
        assert (got.double() - want.double()).norm() <= tolerance * want.double().norm() + 1e-12


def test_gradcheck_in_float64():
    hidden, weight, bias, target, _, _ = draw(5, 4, 11, bias=True)
    for softcap in (None, 3.0):
        assert torch.autograd.gradcheck(
            lambda h, w, b, cap=softcap: linear_logprob(
                h, w, target, bias=b, softcap=cap, temperature=0.7, return_entropy=True,
                chunk_size=2, return_lse=True,
            ),
            (hidden, weight, bias),
        )  # fmt: skip


@pytest.mark.parametrize("entropy", [False, True])
def test_the_chunk_size_does_not_change_anything(entropy):
    hidden, weight, _, target, g, _ = draw(50, 16, 101, bias=False, dtype=torch.float32)
    results = []
    for chunk in (1, 7, 50, None):
        out = linear_logprob(hidden, weight, target, chunk_size=chunk, return_entropy=entropy)
        grads = gradients(out[:1], (g,), (hidden, weight))
        results.append((out.logp.detach(), *grads))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_a_second_backward_over_a_retained_graph_gives_the_same_gradient():
    hidden, weight, _, target, g, e = draw(20, 8, 31, bias=False, dtype=torch.float32)
    out = linear_logprob(hidden, weight, target, return_entropy=True)
    loss = (out.logp * g.float()).sum() + (out.entropy * e.float()).sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("level", [-200.0, 200.0])
def test_logits_far_from_zero_keep_their_digits(level):
    hidden, weight, _, target, _, _ = draw(9, 6, 40, bias=False, dtype=torch.float32)
    bias = torch.full((40,), level)
    moved = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True)
    still = linear_logprob(hidden, weight, target, return_entropy=True)
    for got, want in zip(moved[:2], still[:2], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_forbidden_token_has_no_probability_and_a_finite_gradient():
    hidden, weight, _, target, g, e = draw(12, 6, 10, bias=False, dtype=torch.float32)
    bias = torch.zeros(10)
    bias[3], target[0], target[1:] = -math.inf, 3, 5
    out = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True)
    keep = [v for v in range(10) if v != 3]
    rest = reference(hidden[1:], weight[keep], None, torch.full((11,), 4))
    assert out.logp[0] == -math.inf
    torch.testing.assert_close(out.logp[1:].double(), rest[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(out.entropy[1:].double(), rest[1], atol=5e-6, rtol=0)
    for grad in gradients(out, (g + 1, e), (hidden, weight)):
        assert torch.isfinite(grad).all()


def test_a_head_of_nothing_but_forbidden_tokens_gives_zero_gradient():
    hidden, weight, _, target, g, e = draw(3, 4, 5, bias=False, dtype=torch.float32)
    bias = torch.full((5,), -math.inf)
    out = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True)
    assert (out.logp == -math.inf).all() and (out.entropy == 0).all()
    grads = torch.autograd.grad([*out[:2]], [hidden, weight], [g.float(), e.float()])
    assert all((grad == 0).all() for grad in grads)


def test_ignored_rows_are_zero_and_move_nothing():
    hidden, weight, _, target, g, e = draw(30, 8, 21, bias=False, dtype=torch.float32)
    target[4::3] = -100
    kept = target != -100
    out = linear_logprob(hidden, weight, target, return_entropy=True, chunk_size=4)
    assert (out.logp[~kept] == 0).all() and (out.entropy[~kept] == 0).all()
    alone = linear_logprob(hidden[kept], weight, target[kept], return_entropy=True)
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
    out = linear_logprob(hidden, weight, torch.full((rows,), -100), return_entropy=True)
    (out.logp.sum() + out.entropy.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


def test_a_target_outside_the_vocabulary_poisons_its_own_row_only():
    hidden, weight, _, target, _, _ = draw(4, 5, 9, bias=False, dtype=torch.float32)
    good = linear_logprob(hidden, weight, target).logp
    target[1], target[2] = 9, -1
    bad = linear_logprob(hidden, weight, target)
    assert torch.isnan(bad.logp[1:3]).all()
    torch.testing.assert_close(bad.logp[[0, 3]], good[[0, 3]], atol=0, rtol=0)
    (grad,) = torch.autograd.grad(bad.logp.sum(), [hidden])
    assert torch.isnan(grad[1:3]).all() and torch.isfinite(grad[[0, 3]]).all()


def test_non_finite_hidden_states_show_in_their_own_row():
    hidden, weight, _, target, _, _ = draw(4, 5, 9, bias=False, dtype=torch.float32)
    with torch.no_grad():
        hidden[2, 0] = math.nan
    logp = linear_logprob(hidden, weight, target).logp
    assert torch.isnan(logp).tolist() == [False, False, True, False]


def test_half_precision_inputs_are_not_rounded_again():
    """Logits stay in fp32: log-probs of bf16 inputs equal the exact ones of those inputs."""
    hidden, weight, _, target, g, _ = draw(64, 48, 2000, bias=False, dtype=torch.bfloat16)
    exact, _ = reference(hidden, weight, None, target)
    out = linear_logprob(hidden, weight, target, chunk_size=10)
    torch.testing.assert_close(out.logp.double(), exact, atol=1e-5, rtol=0)
    wanted = gradients((exact,), (g,), (hidden, weight))
    for got, want in zip(gradients(out[:1], (g,), (hidden, weight)), wanted, strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert got.dtype == torch.bfloat16 and error < 3e-3  # 2^-9: one rounding


def test_half_precision_head_is_read_in_slices(monkeypatch):
    hidden, weight, _, target, g, e = draw(12, 8, 50, bias=False, dtype=torch.bfloat16)
    whole = linear_logprob(hidden, weight, target, return_entropy=True)
    whole_grads = gradients(whole, (g, e), (hidden, weight))
    monkeypatch.setattr(torch_backend, "WEIGHT_SLICE_BYTES", 7 * 8 * 4)
    parts = linear_logprob(hidden, weight, target, return_entropy=True)
    torch.testing.assert_close(parts.logp, whole.logp, atol=1e-6, rtol=0)
    for got, want in zip(gradients(parts, (g, e), (hidden, weight)), whole_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-2)


def test_autocast_does_not_round_the_logits():
    hidden, weight, _, target, _, _ = draw(8, 6, 30, bias=False, dtype=torch.float32)
    plain = linear_logprob(hidden, weight, target).logp
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logprob(hidden, weight, target).logp
    assert torch.equal(plain, inside)


def test_leading_dimensions_pass_through():
    hidden, weight, _, target, _, _ = draw(12, 6, 30, bias=False, dtype=torch.float32)
    flat = linear_logprob(hidden, weight, target, return_entropy=True)
    cube = linear_logprob(
        hidden.view(2, 3, 2, 6), weight, target.view(2, 3, 2), return_entropy=True
    )
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
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(
        hidden=torch.zeros(3, 4), weight=torch.zeros(7, 4), target=torch.zeros(3, dtype=torch.long)
    )
    with pytest.raises(ValueError) as error:
        linear_logprob(**{**arguments, **change})
    assert message in str(error.value)


def test_a_partitioned_head_is_refused():
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        linear_logprob(torch.zeros(3, 4), torch.zeros(0), torch.zeros(3, dtype=torch.long))


def test_double_backward_is_refused():
    hidden, weight, _, target, _, _ = draw(4, 5, 9, bias=False)
    out = linear_logprob(hidden, weight, target).logp.square().sum()
    (first,) = torch.autograd.grad(out, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(first.sum(), [hidden])


def test_no_tensor_of_tokens_times_vocabulary_exists():
    """The largest tensor in forward and backward is a chunk of logits, or the head's gradient."""
    n, d, v, rows = 600, 8, 3000, 16
    sizes = set()
    hidden, weight, _, target, g, e = draw(n, d, v, bias=False, dtype=torch.float32)
    with Watch(lambda tensor: sizes.add(tensor.numel())):
        out = linear_logprob(hidden, weight, target, return_entropy=True, chunk_size=rows)
        gradients(out, (g, e), (hidden, weight))
    assert max(sizes) == rows * v


def test_a_frozen_head_gets_no_gradient_buffer():
    hidden, weight, _, target, _, _ = draw(6, 8, 400, bias=False, dtype=torch.float32)
    shapes = set()

    def seen(tensor):
        if tensor.data_ptr() != weight.data_ptr():
            shapes.add(tuple(tensor.shape))

    for wanted in (True, False):
        weight.requires_grad_(wanted)
        shapes.clear()
        logp = linear_logprob(hidden, weight, target, chunk_size=2).logp
        with Watch(seen):
            torch.autograd.grad(logp.sum(), [hidden])
        assert ((400, 8) in shapes) == wanted


PEAK = """
import resource, torch
from rlalign.kernels.linear_logprob import linear_logprob
torch.set_num_threads(1)
hidden = torch.randn(4096, 256, requires_grad=True)
weight = torch.randn(32000, 256, requires_grad=True)
target = torch.randint(0, 32000, (4096,))
def step(n):
    out = linear_logprob(hidden[:n], weight, target[:n], return_entropy=True)
    torch.autograd.grad(out.logp.sum() + out.entropy.sum(), [hidden, weight])
torch.mm(hidden, hidden.T[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_stays_below_the_bound():
    """Two chunks of logits and the head's gradient, plus 25 %; eager: 125 MiB several times."""
    run = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, timeout=120)
    chunk, head = 64 * 2**20, 32000 * 256 * 4
    assert int(run.stdout) * 1024 <= 1.25 * (2 * chunk + head)
