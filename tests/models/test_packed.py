"""The packed forward against transformers' own, one sequence at a time and unpadded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from rlalign.models import attention, packed
from rlalign.models.pack import BUCKET_RATIO, PackingError, collect, make_pack
from rlalign.models.random import init_model, small_config

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2"]
LENGTHS = (9, 30, 3, 29, 1, 17, 30, 12, 24)


def small(architecture: str, **overrides):
    fields = dict(
        vocab=97, hidden=48, layers=3, heads=4, kv_heads=2, mlp=80, max_positions=64,
        tied=True, init_std=0.2,
    )  # fmt: skip
    if architecture == "gemma2":  # logits of attention large enough to meet the cap
        overrides = {"attn_logit_softcapping": 2.0, "sliding_window": 8} | overrides
    if architecture == "mistral":
        overrides = {"sliding_window": 7} | overrides
    return small_config(architecture, **{**fields, **overrides})


def pair(architecture: str, **overrides):
    """Two models with the same weights: transformers' own, and one for packing."""
    config = small(architecture, **overrides)
    own, ours = init_model(config, 0), init_model(config, 0)
    own.set_attn_implementation("eager" if architecture == "gemma2" else "sdpa")
    packed.install(ours)
    return own, ours


def sequences(lengths=LENGTHS, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 97, (n,), generator=rng).tolist()) for n in lengths]


def alone(model, rows):
    """Hidden states of each sequence, run by itself."""
    return [
        model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows
    ]


def together(model, rows, forward=packed.packed_hidden):
    pack = make_pack(rows)
    hidden = forward(model, pack)
    return [hidden[start : start + len(row)] for row, start in zip(rows, pack.start, strict=True)]


def weighted(hiddens):
    """A scalar in which every entry of every hidden state has its own weight."""
    rng = torch.Generator().manual_seed(1)
    return sum((h * torch.randn(h.shape, generator=rng)).sum() for h in hiddens)


def gradient(model, hiddens):
    grads = torch.autograd.grad(weighted(hiddens), list(model.base_model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def assert_close(ours, own, tolerance):
    scale = max(float(h.detach().abs().max()) for h in own)
    for a, b in zip(ours, own, strict=True):
        assert float((a - b).detach().abs().max()) <= tolerance * max(scale, 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("forward", [packed.packed_hidden, packed.padded_hidden])
def test_values_and_gradients_equal_transformers_sequence_by_sequence(architecture, forward):
    own, ours = pair(architecture)
    rows = sequences()
    expected, actual = alone(own, rows), together(ours, rows, forward)
    assert_close(actual, expected, 1e-5)
    want, got = gradient(own, expected), gradient(ours, actual)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_does_not_depend_on_its_neighbours(architecture):
    _, ours = pair(architecture)
    rows = sequences()
    base = together(ours, rows)
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    shuffled = together(ours, [rows[i] for i in order])
    assert_close(shuffled, [base[i] for i in order], 1e-6)
    halves = together(ours, rows[:4]) + together(ours, rows[4:])
    assert_close(halves, base, 1e-6)


# own length of each sequence, and what it continues: a whole path, a part of one, of one's context
TREE = (
    (7, None), (9, (0, 7)), (1, (0, 3)), (30, (1, 12)), (14, None), (3, (4, 14)), (5, (5, 16)),
    (2, (6, 1)), (16, (5, 9)), (11, None), (4, (3, 2)), (1, (8, 25)),
)  # fmt: skip


def whole_rows(parts, parents):
    """Each sequence with all that it continues."""
    rows = []
    for part, parent in zip(parts, parents, strict=True):
        rows.append(part if parent is None else rows[parent[0]][: parent[1]] + part)
    return rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_continued_sequence_runs_once_with_the_values_and_gradients_of_whole_rows(architecture):
    own, ours = pair(architecture)
    lengths, parents = zip(*TREE, strict=True)
    parts = sequences(lengths)
    rows = whole_rows(parts, parents)
    expected = [
        hidden[len(row) - len(part) :]
        for hidden, row, part in zip(alone(own, rows), rows, parts, strict=True)
    ]
    pack = make_pack(parts, parents)
    assert len(pack.input_ids_N) == sum(lengths)
    hidden = packed.packed_hidden(ours, pack)
    actual = [hidden[a : a + len(part)] for part, a in zip(parts, pack.start, strict=True)]
    assert_close(actual, expected, 1e-5)
    want, got = gradient(own, expected), gradient(ours, actual)
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_the_places_of_a_path_hold_the_tokens_of_the_whole_row():
    lengths, parents = zip(*TREE, strict=True)
    parts = sequences(lengths)
    pack = make_pack(parts, parents)
    rows = whole_rows(parts, parents)
    for row, start in zip(rows, pack.path_start, strict=True):
        places = pack.path_M[start : start + len(row)]
        assert tuple(pack.input_ids_N[places].tolist()) == row
        assert pack.position_ids_N[places].tolist() == list(range(len(row)))
    order = sorted(range(len(rows)), key=lambda i: pack.path_start[i])
    ends = [sum(len(rows[i]) for i in order[:n]) for n in range(len(rows) + 1)]
    assert pack.key_boundaries.tolist() == ends


def attention_of_a_path(query, key, value, places, window, softcap):
    """By loops over heads and queries; the last of `places` last."""
    groups = query.shape[1] // key.shape[1]
    out = torch.empty(len(places), *query.shape[1:], dtype=query.dtype)
    for i, place in enumerate(places):
        seen = places[max(0, i + 1 - window) if window else 0 : i + 1]
        for head in range(query.shape[1]):
            scores = key[seen, head // groups] @ query[place, head] / query.shape[2] ** 0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() / scores.exp().sum()
            out[i, head] = weights @ value[seen, head // groups]
    return out


@pytest.mark.parametrize("window", [None, 2, 6])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("parents", [None, [parent for _, parent in TREE]], ids=["rows", "tree"])
def test_attention_in_float64_is_that_of_loops_over_paths(parents, window, softcap):
    """Values and gradients, two query heads to one of keys."""
    lengths = [length for length, _ in TREE]
    parts = sequences(lengths)
    pack = make_pack(parts, parents)
    rng = torch.Generator().manual_seed(2)
    tensors = [
        torch.randn(sum(lengths), heads, 8, generator=rng, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    options = dict(scaling=None, window=window, softcap=softcap)
    actual = attention._bucketed(*tensors, attention.PackedRun(pack), **options)
    expected = torch.empty_like(actual)
    whole = whole_rows(parts, parents) if parents else parts
    for part, row, first in zip(parts, whole, pack.path_start, strict=True):
        places = pack.path_M[first : first + len(row)]
        out = attention_of_a_path(*tensors, places, window, softcap)[-len(part) :]
        expected = expected.index_copy(0, places[-len(part) :], out)
    weight = torch.randn(actual.shape, generator=rng, dtype=torch.float64)
    assert float((actual - expected).detach().abs().max()) <= 1e-12
    grads = [torch.autograd.grad((x * weight).sum(), tensors) for x in (actual, expected)]
    for got, want in zip(*grads, strict=True):
        assert float((got - want).norm()) <= 1e-12 * float(want.norm())


@pytest.mark.parametrize("parent", [1, 2, -1])
def test_a_parent_that_does_not_come_before_is_refused(parent):
    with pytest.raises(ValueError, match="not before it"):
        make_pack([(1,), (2,)], [None, (parent, 1)])


@pytest.mark.parametrize("length", [0, -1, 4])
def test_more_than_there_is_to_continue_is_refused(length):
    """The path of the second has three tokens, of which one is its own."""
    with pytest.raises(ValueError, match=f"first {length} tokens of sequence 1.* has 3"):
        make_pack([(1, 2), (3,), (4,)], [None, (0, 2), (1, length)])


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_equal_lengths_need_no_padding_and_give_the_same(architecture):
    own, ours = pair(architecture)
    rows = sequences((11,) * 5)
    assert make_pack(rows).dense
    assert_close(together(ours, rows), alone(own, rows), 1e-5)


@pytest.mark.parametrize("parents", [None, [parent for _, parent in TREE]], ids=["rows", "tree"])
def test_gradient_checkpointing_changes_nothing(parents):
    _, ours = pair("qwen2")
    parts = sequences([length for length, _ in TREE])

    def hiddens():
        return [packed.packed_hidden(ours, make_pack(parts, parents))]

    plain = gradient(ours, hiddens())
    ours.train()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(plain, gradient(ours, hiddens()))


def test_the_pack_lays_sequences_out_longest_first():
    pack = make_pack([(5, 6), (7, 8, 9)])
    assert pack.input_ids_N.tolist() == [7, 8, 9, 5, 6]
    assert pack.position_ids_N.tolist() == [0, 1, 2, 0, 1]
    assert pack.start == (3, 0) and pack.boundaries.tolist() == [0, 3, 5]


def test_a_token_taken_often_adds_its_gradients_in_float32():
    """1 + 300 x 1/256 in bfloat16 would stay at 1."""
    rows = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([1.0] + [1 / 256] * 300, dtype=torch.bfloat16)[:, None]
    (collect(rows, torch.ones(301, dtype=torch.long)) * weight).sum().backward()
    assert rows.grad.tolist() == [[0.0], [2.171875]]


def test_buckets_waste_little_and_cover_every_token():
    lengths = [1 + 13 * i % 97 for i in range(60)]
    pack = make_pack(sequences(lengths))
    grid = sum(bucket.count * bucket.queries for bucket in pack.buckets)
    assert grid == len(pack.query_Q) <= sum(lengths) / BUCKET_RATIO
    assert pack.query_Q[pack.cell_N].tolist() == list(range(sum(lengths)))


def test_a_long_context_gets_no_cells_for_queries():
    """Sixteen tails of 10 to 14 tokens behind 100 and 90 of the first sequence."""
    tails = [10 + i % 5 for i in range(16)]
    pack = make_pack(sequences([100, *tails]), [None, *[(0, 90 + i % 2 * 10) for i in range(16)]])
    assert len(pack.query_Q) <= 100 + 16 * 14
    assert pack.query_Q[pack.cell_N].tolist() == list(range(100 + sum(tails)))


def test_an_installed_model_still_generates_like_before():
    """The engine that samples shares the module: without a pack nothing has changed."""
    for architecture in ("qwen2", "gemma2"):
        own, ours = pair(architecture)
        prompt = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(own.generate(prompt, **options), ours.generate(prompt, **options))


def test_no_quadratic_mask_is_built():
    _, ours = pair("mistral", max_positions=4096)
    rows = sequences((16,) * 128)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with torch.no_grad(), Watch():
        packed.packed_hidden(ours, make_pack(rows))
    assert largest < 2048 * 2048


def test_attention_without_keyword_arguments_is_refused(monkeypatch):
    _, ours = pair("llama")
    inner = type(ours.base_model.layers[0]).forward

    def forgetful(self, hidden_states, packed_run=None, **kwargs):
        return inner(self, hidden_states, **kwargs)

    monkeypatch.setattr(type(ours.base_model.layers[0]), "forward", forgetful)
    with pytest.raises(PackingError, match=r"trainer\.packing=false"):
        together(ours, sequences())


def test_layers_that_are_not_attention_are_refused():
    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=32, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    packed.install(model)
    with pytest.raises(PackingError, match=r"Qwen3Next.*1 of its 2 layers"):
        together(model, sequences())


def test_attention_with_sinks_is_refused():
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=32, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PackingError, match="s_aux"):
        packed.install(model)
        together(model, sequences())


def test_an_empty_pack_is_refused():
    for rows in ([], [(1, 2), ()]):
        with pytest.raises(ValueError, match="at least one sequence"):
            make_pack(rows)


def test_the_math_kernel_agrees():
    """Not an artefact of the fused kernel: the plain one gives the same gradients."""
    _, ours = pair("qwen2")
    rows = sequences()
    fused = gradient(ours, together(ours, rows))
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradient(ours, together(ours, rows))
    assert (fused - plain).norm() <= 1e-5 * plain.norm()
