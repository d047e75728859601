"""Defects that other implementations of this function have or had, one test each.

Each test says whose defect it is, and shows with a few lines of the defective computation that its
inputs would bring it to light. Defects that other tests of this folder cover, and where:

    one upstream for all tokens             Liger 968 and 1298, NeMo Automodel 3853
        test_linear_logprob.py::test_gradients_equal_the_definition
    gradients made in the forward pass      Liger chunked losses
        test_linear_logprob.py::test_a_second_backward_over_a_retained_graph_gives_the_same_gradient
    logits rounded to half precision        eager, TRL 1.16, verl, Liger's fallback
        test_linear_logprob.py::test_half_precision_inputs_are_not_rounded_again
        test_linear_logprob.py::test_autocast_does_not_round_the_logits
    entropy rounded to half precision       Liger scaled CE
        test_linear_logprob.py::test_half_precision_inputs_are_not_rounded_again
    temperature, softcap, entropy dropped   F.linear_cross_entropy as a fallback, which has none
        test_linear_logprob.py::test_values_equal_the_definition
        test_linear_logprob.py::test_gradients_equal_the_definition
    rows counted that are to be ignored     any wrapper that clamps -100 to 0
        test_linear_logprob.py::test_ignored_rows_are_zero_and_move_nothing
        test_linear_logprob.py::test_no_scored_row_still_runs_backward_with_exact_zeros
    wrong targets clamped in silence        kernels that guard their loads alone
        test_linear_logprob.py::test_a_target_outside_the_vocabulary_poisons_its_own_row_only
    0 * -inf of a forbidden token           any entropy as sum p z
        test_linear_logprob.py::test_a_forbidden_token_has_no_probability_and_a_finite_gradient
    NaN hidden by the guard of a maximum    kernels with one
        test_linear_logprob.py::test_non_finite_hidden_states_show_in_their_own_row
    second derivatives wrong in silence     autograd functions that do not refuse
        test_linear_logprob.py::test_double_backward_is_refused
    [V, D] allocated for a frozen head      prime-rl 3011
        test_linear_logprob.py::test_a_frozen_head_gets_no_gradient_buffer
    an empty ZeRO-3 part taken for a head   any that does not gather it
        test_linear_logprob.py::test_a_partitioned_head_is_refused
    an adapter on the head ignored          and forbidden elsewhere: TRL 4612
        test_head_parts.py::test_an_adapter_on_the_head_equals_the_merged_head
    padding rows of the head counted        any head padded for the hardware
        test_head_parts.py::test_padding_rows_of_the_head_have_no_probability_and_no_gradient
    all_reduce in forward: no gradient for  ms-swift 9947
    the parts that do not own the target
        test_head_parts.py::test_a_head_split_over_processes_gives_what_the_whole_one_does
    dH summed twice or never                ml-cross-entropy 42
        the same, and here for frameworks that sum it themselves
    offsets beyond 32 bits                  Triton kernels with int32 products
        gpu_triton.py::test_more_than_two_to_the_31_elements_are_addressed (GPU)
    eager under torch.compile               F.linear_cross_entropy
        test_compile.py::test_a_loss_on_top_compiles_without_a_graph_break

Run on the torch backend here, and on the Triton backend by tests/kernels/test_interpreted.py.
Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from rlalign.kernels import op, torch_backend
from rlalign.kernels.linear_logprob import Lora, VocabParallel
from tests.kernels import cases
from tests.kernels.cases import BACKEND, DEVICE, assert_near, draw, gradients, reference, score
from tests.kernels.stand_ins import Processes, count_launches
from tests.kernels.watch import Waits

EXPOSED = 20  # times the tolerance, at least: how far off the defective result is
ROUNDED = 5e-3  # relative: dL/dz and the result in bfloat16, which the interpreter cuts off


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles along every axis, as on a GPU."""
    if BACKEND == "triton":
        from rlalign.kernels import triton_backend

        cases.use_tiles(monkeypatch, rows=16, cols=64, depth=16, group=2)
        monkeypatch.setattr(triton_backend, "MIN_COLUMNS", 64)


def doubles(*inputs):
    return [None if x is None else x.detach().double().requires_grad_() for x in inputs]


def at_once(hidden, weight, target, g):
    """In float64 with whole matrices, for what has many rows or logits beyond exp's range: copies
    of the inputs, logits, logp, and d(g . logp) / d logits."""
    copies = doubles(hidden, weight)
    logits_NV = copies[0] @ copies[1].T
    logp = torch.log_softmax(logits_NV, 1).gather(1, target[:, None])[:, 0]
    p_NV = torch.softmax(logits_NV.detach(), 1)
    chosen_NV = torch.nn.functional.one_hot(target, len(weight))
    return copies, logits_NV.detach(), logp, g[:, None] * (chosen_NV - p_NV)


def assert_values(got, want, atol):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


def assert_far(defective, want, atol):
    """Or the test could not tell the defect."""
    error = (defective.detach().double() - want.detach().double()).abs().max()
    assert not error <= EXPOSED * atol, float(error)  # a NaN is far


def assert_far_by_norm(defective, want, relative, times=EXPOSED):
    error = (defective.detach().double() - want.double()).norm() / want.double().norm()
    assert not error <= times * relative, float(error)


@pytest.mark.parametrize("vocab", [63, 65])
def test_columns_past_the_last_are_no_logits_of_zero(vocab):
    """verl 2656 and 2899: weight rows past the end of the vocabulary are read as 0, and each counts
    as exp(0 - m). A vocabulary that is no multiple of the tile, and negative logits, show it."""
    hidden, weight, bias, target, g, e, _ = draw(9, 16, vocab, bias=True, dtype=torch.float32)
    bias = (bias.detach() - 9).requires_grad_()
    copies = doubles(hidden, weight, bias)
    logp, entropy, lse = reference(*copies, target)
    out = score(hidden, weight, target, bias=bias, return_entropy=True, return_lse=True)
    for got, want in zip(out, (logp, entropy, lse), strict=True):
        assert_values(got, want, 5e-6)
    inputs = (hidden, weight, bias)
    wanted = gradients((logp, entropy), (g, e), copies)
    for got, want in zip(gradients(out, (g, e), inputs), wanted, strict=True):
        assert_near(got, want, 5e-6)
    padding = -vocab % 64
    assert_far((lse.exp() + padding).log(), lse, 5e-6)


def test_the_running_maximum_does_not_start_at_zero():
    """verl's merge of the parts of the vocabulary, fixed in SkyRL 2141: logits far below 0 vanish
    beside a maximum of 0, and the log of their sum is -inf. Several parts, of several tiles."""
    hidden, weight, _, target, g, e, _ = draw(9, 16, 1100, bias=False, dtype=torch.float32)
    bias = torch.full((1100,), -200.0)
    copies = doubles(hidden, weight)
    expected = reference(*copies, bias, target)
    out = score(hidden, weight, target, bias=bias, return_entropy=True)
    for got, want in zip(out[:2], expected, strict=False):
        assert_values(got, want, 1e-4)  # a float32 logit of -200 has a last digit of 1.5e-5
    wanted = gradients(expected, (g, e), copies)
    for got, want in zip(gradients(out, (g, e), (hidden, weight)), wanted, strict=True):
        assert_near(got, want, 1e-4)
    logits_NV = hidden @ weight.T + bias
    assert_far(logits_NV.exp().sum(1).log(), expected[2], 1e-4)


def test_a_part_of_the_vocabulary_without_any_probability_adds_nothing():
    """A merge without guards: the factor exp(-inf - -inf) of a part that is forbidden throughout is
    NaN, and so is -inf * 0 in its moment. Here those are the first tiles, and a whole part."""
    hidden, weight, _, target, g, e, _ = draw(9, 16, 1100, bias=False, dtype=torch.float32)
    first = 400
    target = first + target % (1100 - first)
    bias = torch.zeros(1100)
    bias[:first] = -math.inf
    copies = doubles(hidden, weight)
    expected = reference(copies[0], copies[1][first:], None, target - first)
    out = score(hidden, weight, target, bias=bias, return_entropy=True, return_lse=True)
    for got, want in zip(out, expected, strict=True):
        assert_values(got, want, 5e-6)
    wanted = gradients(expected, (g, e), copies)
    for got, want in zip(gradients(out, (g, e), (hidden, weight)), wanted, strict=True):
        assert_near(got, want, 5e-6)
    part_max, part_sum = bias[:first].amax(), bias[:first].exp().sum()
    assert torch.isnan((part_max - part_max).exp())
    assert torch.isnan((part_max - bias.amax()) * part_sum)


def test_the_bias_is_counted_once_however_deep_the_head_is():
    """cut-cross-entropy issue 52: the bias of the target was added once for every chunk of the
    hidden size. Several chunks here, and the depth of an adapter after them."""
    hidden, weight, bias, target, g, *_ = draw(9, 160, 70, bias=True, dtype=torch.float32)
    rng = torch.Generator("cpu").manual_seed(1)
    low_NR = torch.randn(9, 20, generator=rng, device="cpu").to(DEVICE)
    up_VR = torch.randn(70, 20, generator=rng, device="cpu").to(DEVICE) / 5
    copies = doubles(hidden, weight, bias)
    wide = [torch.cat([a, b.double()], 1) for a, b in zip(copies, (low_NR, up_VR), strict=False)]
    logp = reference(*wide, copies[2], target)[0]
    out = score(hidden, weight, target, bias=bias, lora=Lora(low_NR, up_VR))
    assert_values(out.logp, logp, 1e-5)
    (want,) = gradients([logp], [g], [copies[2]])
    (got,) = gradients(out[:1], [g], [bias])
    assert_near(got, want, 1e-5)
    assert_far(logp + bias[target], logp, 1e-5)


def test_the_slope_of_the_softcap_is_taken_from_the_capped_logit_as_it_is():
    """A backward pass over capped logits c, as in cut-cross-entropy, has the slope 1 - (c / cap)^2;
    the formula for raw logits, 1 - tanh(u / cap)^2, is wrong for them. Logits well into saturation
    show it."""
    cap, temperature = 2.0, 0.7
    hidden, weight, _, target, g, *_ = draw(13, 16, 150, bias=False, dtype=torch.float32)
    copies = doubles(hidden, weight)
    expected = reference(*copies, None, target, temperature=temperature, softcap=cap)
    wanted = gradients(expected[:1], [g], copies)
    out = score(hidden, weight, target, temperature=temperature, softcap=cap)
    for got, want in zip(gradients(out[:1], [g], (hidden, weight)), wanted, strict=True):
        assert_near(got, want, 5e-6)
    hidden_ND, weight_VD = (x.detach() for x in copies[:2])
    capped_NV = cap * torch.tanh(hidden_ND @ weight_VD.T / cap)
    dz_NV = -g[:, None] * torch.softmax(capped_NV / temperature, 1)
    dz_NV[torch.arange(13), target] += g

    def d_hidden(ratio_NV):
        return (dz_NV * (1 - ratio_NV.square()) / temperature) @ weight_VD

    assert_near(d_hidden(capped_NV / cap), wanted[0], 1e-9)
    assert_far_by_norm(d_hidden(torch.tanh(capped_NV / cap)), wanted[0], 5e-6)


def test_more_rows_than_the_second_axis_of_a_grid_has(monkeypatch):
    """Liger 1294: a grid of (sequences, tokens) ends at 65535 along every axis but the first. Ours
    have no other; the interpreter has no limit, so the grids are looked at."""
    rows = 65_601
    if BACKEND == "triton":
        cases.use_tiles(monkeypatch, rows=2048)
    grids = count_launches(monkeypatch)
    hidden, weight, _, target, g, *_ = draw(rows, 2, 5, bias=False, dtype=torch.float32)
    out = score(hidden, weight, target)
    grads = gradients(out[:1], [g], (hidden, weight))
    copies, _, logp, _ = at_once(hidden, weight, target, g)
    assert_values(out.logp, logp, 5e-6)
    for got, want in zip(grads, gradients([logp], [g], copies), strict=True):
        assert_near(got, want, 1e-5)
    assert all(len(grid) == 1 for grid in grids)
    assert bool(grids) == (BACKEND == "triton")


def test_the_heads_gradient_is_not_summed_in_bfloat16_over_rows():
    """Liger 512 and ml-cross-entropy 14 (the default of both is to sum in the weight's dtype), and
    the waves of Liger's scaled CE: each addition in bfloat16 loses what is below its last digit."""
    rows = 512
    hidden, weight, _, target, g, *_ = draw(rows, 16, 32, bias=False, dtype=torch.bfloat16)
    hidden = (hidden.detach() + 1).requires_grad_()  # rows that point the same way
    g, target = g.abs(), torch.zeros_like(target)  # and pull the same way
    copies, _, logp, dz_NV = at_once(hidden, weight, target, g)
    (want,) = gradients([logp], [g], [copies[1]])
    (got,) = gradients(score(hidden, weight, target, chunk_size=1)[:1], [g], [weight])
    assert_near(got, want, ROUNDED)
    summed = torch.zeros_like(weight)
    for n in range(rows):
        summed += (dz_NV[n][:, None] * hidden[n].double()).to(torch.bfloat16)
    assert_far_by_norm(summed, want, ROUNDED, times=3)


def test_the_hidden_gradient_is_not_summed_in_bfloat16_over_the_vocabulary(monkeypatch):
    """verl's default backward: dH of each piece of the vocabulary is added up in bfloat16 (TRL
    notes that entropy then drifts). Many pieces show it."""
    width, vocab, piece = 16, 2048, 16
    monkeypatch.setitem(torch_backend.TILE_SIDE, "cpu", piece)
    monkeypatch.setattr(torch_backend, "SLICE_BYTES", 0)
    if BACKEND == "triton":
        from rlalign.kernels import triton_backend

        monkeypatch.setattr(triton_backend, "workspace_columns", lambda *_: 4 * piece)
    hidden, weight, _, target, g, *_ = draw(8, width, vocab, bias=False, dtype=torch.bfloat16)
    weight = (weight.detach() + 1).requires_grad_()  # pieces that point the same way add up
    copies, _, logp, dz_NV = at_once(hidden, weight, target, g)
    (want,) = gradients([logp], [g], [copies[0]])
    (got,) = gradients(score(hidden, weight, target)[:1], [g], [hidden])
    assert_near(got, want, ROUNDED)
    summed = torch.zeros_like(hidden)
    for v in range(0, vocab, piece):
        at = slice(v, v + piece)
        summed += (dz_NV[:, at] @ copies[1][at]).to(torch.bfloat16)
    assert_far_by_norm(summed, want, ROUNDED, times=3)


def test_logits_beyond_the_range_of_float16_are_logits_like_any_other():
    """Liger's kernel for Hopper stages logits as float16, which ends at 65504, and so does any
    product of float16 matrices that is returned as one."""
    hidden, weight, _, target, g, *_ = draw(9, 64, 70, bias=False, dtype=torch.float16)
    hidden, weight = ((200 * x.detach()).requires_grad_() for x in (hidden, weight))
    copies, logits_NV, logp, _ = at_once(hidden, weight, target, g)
    assert logits_NV.abs().max() > 65504
    out = score(hidden, weight, target)
    torch.testing.assert_close(out.logp.double(), logp, atol=0.1, rtol=1e-6)
    wanted = gradients([logp], [g], copies)
    for got, want in zip(gradients(out[:1], [g], (hidden, weight)), wanted, strict=True):
        assert_near(got, want, 1e-3)
    assert not torch.isfinite(torch.log_softmax(logits_NV.half().float(), 1)).all()


def test_a_kernel_that_runs_again_changes_nothing(monkeypatch):
    """SkyRL 2141: a tuner runs its candidates on the very buffers of the call, so what a kernel
    adds to its output, or writes to its input, is there several times. And sums by atomics or locks
    (cut-cross-entropy) differ from one call to the next."""
    hidden, weight, bias, target, *upstream = draw(17, 24, 150, bias=True, dtype=torch.bfloat16)
    inputs = (hidden, weight, bias)
    before = [x.detach().clone() for x in (*inputs, target, *upstream)]

    def compute():
        out = score(hidden, weight, target, bias=bias, return_entropy=True, return_lse=True)
        return [x.detach() for x in (*out, *gradients(out, upstream, inputs))]

    once, again = compute(), compute()
    grids = count_launches(monkeypatch, times=3)
    tuned = compute()
    assert bool(grids) == (BACKEND == "triton")
    for other in (again, tuned):
        assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))
    after = (*inputs, target, *upstream)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_host_waits_for_the_list_of_rows_and_for_nothing_else():
    """Liger FLCE calls .item() on counts, and the host stands still until the device is done. Here
    it waits once in either pass, whatever the chunks, for the rows that there are to run."""
    hidden, weight, _, target, g, e, _ = draw(40, 16, 300, bias=False, dtype=torch.float32)
    target[::7] = -100
    with Waits() as forward:
        out = score(hidden, weight, target, return_entropy=True, chunk_size=4)
    loss = (out.logp * g.float()).sum() + (out.entropy * e.float()).sum()
    with Waits() as backward:
        torch.autograd.grad(loss, [hidden, weight])
    assert forward.found == backward.found == ["nonzero"]
    with Waits() as counted:
        (target != -100).sum().item()
    with Waits() as masked:
        hidden.detach()[target != -100]
    assert len(counted.found) == len(masked.found) == 1


def test_the_entropy_of_large_logits_keeps_its_digits():
    """TRL 1.16 and Liger's scaled CE: lse - sum p z is the difference of two large numbers. Logits
    are exact in float32 here, so every wrong digit is the entropy's."""
    hidden, weight, _, target, *_ = draw(24, 8, 1000, bias=False, dtype=torch.float32)
    hidden, weight = ((2 * x.detach()).round() / 2 for x in (hidden, 2 * weight))
    bias = torch.full((1000,), 512.0)
    entropy = reference(hidden, weight, bias, target)[1]
    out = score(hidden, weight, target, bias=bias, return_entropy=True)
    assert_values(out.entropy, entropy, 5e-6)
    logits_NV = hidden @ weight.T + bias
    mean_N = (torch.softmax(logits_NV, 1) * logits_NV).sum(1)
    assert_far(logits_NV.logsumexp(1) - mean_N, entropy, 5e-6)


def test_tokens_of_little_probability_keep_their_gradient():
    """cut-cross-entropy by default leaves out tiles in which no |p - 1[y]| reaches 2^-12: what is
    unlikely is never pushed down, and an entropy bonus, which lives there, is lost."""
    hidden, weight, _, target, g, e, _ = draw(9, 16, 300, bias=False, dtype=torch.float32)
    likely = 64
    target, bias = target % likely, torch.zeros(300)
    bias[likely:] = -12
    copies = doubles(hidden, weight)
    probabilities_NV = torch.softmax(copies[0] @ copies[1].T + bias, 1)
    assert probabilities_NV[:, likely:].max() < 2**-12
    for upstream in ((g, None), (None, e)):
        out = score(hidden, weight, target, bias=bias, return_entropy=True)
        (got,) = gradients(out, upstream, [weight])
        expected = reference(*copies, bias, target)
        (want,) = gradients(expected, upstream, [copies[1]])
        assert want[likely:].norm() > 1e-5
        assert_near(got[likely:], want[likely:], 1e-5)


@pytest.mark.parametrize("reduce", [True, False])
def test_the_hidden_gradient_is_summed_over_processes_once_or_by_the_framework(reduce, monkeypatch):
    """ml-cross-entropy 42: kernel and framework both summed dH, or neither did. ms-swift 9947: a
    part that does not hold the target got no gradient at all."""
    bounds = (0, 90, 200)
    hidden, weight, _, target, g, e, _ = draw(15, 16, 200, bias=False, dtype=torch.float32)
    target = target % 90  # all with the first
    whole = score(hidden, weight, target, return_entropy=True)
    want, _ = gradients(whole, (g, e), (hidden, weight))
    processes = Processes(2, 15)
    monkeypatch.setattr(op, "dist", processes)
    monkeypatch.setattr(op, "_process_group", lambda name: None)
    parts = []
    for turn in range(4):
        processes.rank, processes.sums = turn % 2, 0
        start, stop = bounds[turn % 2 :][:2]
        out = score(
            hidden, weight[start:stop], target, return_entropy=True, vocab_size=200,
            vocab_parallel=VocabParallel(start, stop, processes, reduce_hidden_grad=reduce),
        )  # fmt: skip
        parts.append(gradients(out, (g, e), [hidden])[0])
        assert processes.sums == int(reduce)
    assert_near(parts[2] + parts[3], want, 3e-6)
    for part in parts[2:]:
        assert_far_by_norm(part, want, 3e-6)
        assert part.norm() > 0.05 * want.norm()  # also where no target is


@pytest.mark.skipif(DEVICE == "cuda", reason="a process group on a CPU")
def test_a_head_that_is_a_part_of_a_distributed_tensor_is_refused():
    """Kernels that take whatever has a data pointer would score with this process's rows alone."""
    mine = not dist.is_initialized()  # an engine that ran before may have left its own, of one
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        head = DTensor.from_local(torch.zeros(7, 4), mesh, [Shard(0)])
        with pytest.raises(TypeError, match="weight is a DTensor"):
            score(torch.zeros(3, 4), head, torch.zeros(3, dtype=torch.long))
    finally:
        if mine:
            dist.destroy_process_group()
