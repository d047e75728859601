"""vLLM's adapters on a CPU: each token gets its own adapter, and one without gets none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlalign.rollout import vllm_lora_cpu

SIZES = (6, 4)  # output slices, as of fused layers
PLACES, RANK, WIDTH, SCALE = 3, 2, 5, 0.7


def drawn(seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    a = tuple(torch.randn(PLACES, 1, RANK, WIDTH, generator=rng) for _ in SIZES)
    b = tuple(torch.randn(PLACES, 1, size, RANK, generator=rng) for size in SIZES)
    return a, b, torch.randn(8, WIDTH, generator=rng), torch.randn(8, sum(SIZES), generator=rng)


@pytest.mark.parametrize(
    "places",
    [
        [2, 2, 2, 2, 2, 2, 2, 2],
        [0, 2, -1, 2, 0, 1, -1, 1],  # every place is taken, and some tokens have none
        [-1, -1, 1, 1, -1, 1, 1, 1],
        [-1] * 8,
    ],
)
def test_tokens_get_their_own_adapter_or_none(places):
    a, b, x, y = drawn()
    want = y.double()
    for n, place in enumerate(places):
        first = 0
        for a_, b_, size in zip(a, b, SIZES, strict=True):
            if place >= 0:
                low = a_[place, 0].double() @ x[n].double()
                want[n, first : first + size] += SCALE * (b_[place, 0].double() @ low)
            first += size
    wrapper = SimpleNamespace(token_rows=vllm_lora_cpu.Rows(torch.tensor(places)), joined={})
    got = y.clone()
    vllm_lora_cpu._add_lora_linear(wrapper, got, x, a, b, SCALE, SIZES)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    untouched = [n for n, place in enumerate(places) if place < 0]
    assert torch.equal(got[untouched], y[untouched])


@pytest.mark.parametrize("places", [[0, 2, -1, 2, 0, 1, -1, 1], [2] * 8, [-1] * 8])
def test_embeddings_get_their_own_adapter_or_none(places):
    """`x` is already each token's row of its adapter's A, or anything where it has none."""
    rng = torch.Generator().manual_seed(0)
    b = torch.randn(PLACES, 1, 6, RANK, generator=rng)
    x, y = torch.randn(8, RANK, generator=rng), torch.randn(8, 6, generator=rng)
    want = y.double()
    for n, place in enumerate(places):
        if place >= 0:
            want[n] += b[place, 0].double() @ x[n].double()
    got = y.clone()
    wrapper = SimpleNamespace(token_rows=vllm_lora_cpu.Rows(torch.tensor(places)))
    vllm_lora_cpu._add_lora_embedding(wrapper, got, x, b, True)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
