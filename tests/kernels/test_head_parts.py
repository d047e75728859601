"""Heads that are more than one matrix: an adapter, padding, a part on each process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlalign.kernels.linear_logprob import Lora, VocabParallel
from tests.kernels import split_head
from tests.kernels.cases import DEVICE, assert_near, draw, gradients, score
from tests.kernels.split_head import OPTIONS, D, N, V, adapter
from tests.trainer.ranks import run_ranks


@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapter_on_the_head_equals_the_merged_head(frozen):
    """LoRA: W + scale B A, without making it; with a frozen W only B has a [V, .] gradient."""
    hidden, weight, bias, target, *upstream = draw(N, D, V, bias=True, dtype=torch.float32)
    a_RD, b_VR = adapter()
    weight.requires_grad_(not frozen)
    inputs = [hidden, bias, a_RD, b_VR, *([] if frozen else [weight])]
    merged = score(
        hidden, weight + 0.5 * b_VR @ a_RD, target, bias=bias, return_lse=True, **OPTIONS
    )
    lora = Lora(0.5 * hidden @ a_RD.T, b_VR)
    apart = score(hidden, weight, target, bias=bias, lora=lora, return_lse=True, **OPTIONS)
    for got, want in zip(apart, merged, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    pairs = zip(
        gradients(apart, upstream, inputs), gradients(merged, upstream, inputs), strict=True
    )
    for got, want in pairs:
        assert_near(got, want, 3e-6)


def test_an_adapter_in_another_dtype_than_the_head_is_welcome():
    """As PEFT keeps it: a float32 adapter on a half-precision head."""
    hidden, weight, _, target, g, *_ = draw(N, D, V, bias=False, dtype=torch.bfloat16)
    a_RD, b_VR = adapter()
    lora = Lora(hidden.float() @ a_RD.T, b_VR)
    out = score(hidden, weight, target, lora=lora, backend="auto")
    merged = score(hidden.float(), weight.float() + b_VR @ a_RD, target, backend="torch")
    torch.testing.assert_close(out.logp, merged.logp, atol=1e-5, rtol=0)
    pairs = zip(
        gradients([out.logp], [g], [a_RD, b_VR]),
        gradients([merged.logp], [g], [a_RD, b_VR]),
        strict=True,
    )
    for got, want in pairs:
        assert got.dtype == torch.float32
        assert_near(got, want, 5e-3)


def test_padding_rows_of_the_head_have_no_probability_and_no_gradient():
    hidden, weight, bias, target, *upstream = draw(N, D, V, bias=True, dtype=torch.float32)
    real = 257
    target = target % real
    padded = score(hidden, weight, target, bias=bias, vocab_size=real, **OPTIONS)
    alone = score(hidden, weight[:real], target, bias=bias[:real], **OPTIONS)
    for got, want in zip(padded[:2], alone[:2], strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    inputs = (hidden, weight, bias)
    actual = gradients(padded[:2], upstream[:2], inputs)
    expected = gradients(alone[:2], upstream[:2], inputs)
    for got, want in zip(actual, expected, strict=True):
        assert_near(got, want, 1e-6)
    assert (actual[1][real:] == 0).all() and (actual[2][real:] == 0).all()


def test_a_padding_row_is_no_target():
    hidden, weight, _, target, *_ = draw(3, D, 20, bias=False, dtype=torch.float32)
    target[1] = 15
    logp = score(hidden, weight, target % 16, vocab_size=15).logp
    assert torch.isnan(logp).tolist() == [t == 15 for t in (target % 16).tolist()]
    with pytest.raises(ValueError, match="targets are outside the vocabulary of 15"):
        score(hidden, weight, target % 16, vocab_size=15, validate=True)


def test_a_shard_needs_the_size_of_the_whole():
    hidden, weight, _, target, *_ = draw(3, D, 20, bias=False, dtype=torch.float32)
    with pytest.raises(ValueError, match="needs vocab_size"):
        score(hidden, weight, target, vocab_parallel=VocabParallel(0, 20))
    with pytest.raises(ValueError, match=r"vocab shard \[0,21\) has 20 rows"):
        score(hidden, weight, target, vocab_parallel=VocabParallel(0, 21), vocab_size=40)


@pytest.mark.skipif(DEVICE == "cuda", reason="processes of their own on a CPU")
@pytest.mark.parametrize("ranks", split_head.BOUNDS)
def test_a_head_split_over_processes_gives_what_the_whole_one_does(ranks, tmp_path):
    run_ranks(Path(split_head.__file__), str(tmp_path), size=ranks)
    values, (d_hidden, d_low, *d_parts) = split_head.compute()
    for rank in range(ranks):
        start, stop = split_head.BOUNDS[ranks][rank : rank + 2]
        got_values, got_grads = torch.load(tmp_path / f"{rank}.pt")
        for got, want in zip(got_values, values, strict=True):
            torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
        wanted = [d_hidden, d_low, *(x[start:stop] for x in d_parts)]
        for got, want in zip(got_grads, wanted, strict=True):
            assert float(want.norm()) > 0 or start >= split_head.REAL
            assert_near(got, want, 2e-6)
