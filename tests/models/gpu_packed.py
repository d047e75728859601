"""The variable-length attention of packed models, which only a GPU in half precision takes; run by
benchmarks/gpu_suite.sh, and by hand."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rlalign.models import attention, packed
from rlalign.models.pack import make_pack

pytestmark = pytest.mark.gpu
# grouped heads need torch 2.13, which the project asks for; older ones show the rest
KV_HEADS = 2 if "enable_gqa" in inspect.signature(varlen_attn).parameters else 4
SIZES = dict(
    vocab_size=97, hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=KV_HEADS, intermediate_size=160, max_position_embeddings=512,
)  # fmt: skip
# own length and what it continues: a whole path, a part of one, of one's context
TREE = (
    (70, None), (90, (0, 70)), (1, (0, 31)), (200, (1, 120)), (14, None), (33, (4, 14)),
    (50, (5, 47)), (16, (6, 9)), (111, None),
)  # fmt: skip


def model(kind: str, dtype: torch.dtype):
    torch.manual_seed(0)
    if kind == "llama":
        built = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        built = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=48))
    return built.to("cuda", dtype)


@pytest.mark.parametrize("kind", ["llama", "mistral with a window"])
def test_packed_trees_in_half_precision_are_near_whole_rows_in_float32(kind, monkeypatch):
    calls = []
    varlen = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *a: calls.append(1) or varlen(*a))
    rng = torch.Generator("cpu").manual_seed(1)
    parts = [
        tuple(torch.randint(0, 97, (n,), generator=rng, device="cpu").tolist()) for n, _ in TREE
    ]
    parents = [parent for _, parent in TREE]
    exact, ours = model(kind, torch.float32), model(kind, torch.bfloat16)
    packed.install(ours)
    rows, expected = [], []
    for part, parent in zip(parts, parents, strict=True):
        rows.append(part if parent is None else rows[parent[0]][: parent[1]] + part)
        hidden = exact.base_model(torch.tensor([rows[-1]], device="cuda"), use_cache=False)
        expected.append(hidden.last_hidden_state[0, -len(part) :])
    pack = make_pack(parts, parents, "cuda")
    hidden = packed.packed_hidden(ours, pack)
    assert len(calls) == SIZES["num_hidden_layers"]
    actual = [hidden[a : a + len(part)] for part, a in zip(parts, pack.start, strict=True)]
    weights = [torch.randn(h.shape, generator=rng, device="cpu").cuda() for h in expected]
    for got, want in zip(actual, expected, strict=True):
        assert (got.float() - want).norm() <= 0.03 * want.norm()
    for outputs in (expected, actual):
        total = sum((h.float() * w).sum() for h, w in zip(outputs, weights, strict=True))
        total.backward()
    pairs = zip(exact.base_model.named_parameters(), ours.base_model.parameters(), strict=True)
    for (name, want), got in pairs:
        assert (got.grad.float() - want.grad).norm() <= 0.06 * want.grad.norm(), name
