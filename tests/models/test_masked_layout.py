"""Other projects' checkpoints: the maths of each, written down here from its formulas and the
names in its files, and what is loaded and saved."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from rlalign.config.schema import ModelConfig
from rlalign.models.errors import ModelError
from rlalign.models.masked_diffusion import Canvas
from rlalign.models.masked_layout import FAMILIES, LLADA_SWITCHES, Layout
from rlalign.models.masked_load import load_masked_lm
from rlalign.models.masked_random import write_random_masked

HEADS, KV_HEADS, HIDDEN = 4, 2, 32
IDS = [4, 200, 31, 262, 77, 262, 9, 262, 120]  # 262 is the mask token


def norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x, theta):
    """x [T, head, d]: dimension i and i + d/2 turned by position * theta^(-2i/d)."""
    length, _, width = x.shape
    half = width // 2
    angle = torch.arange(length).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, sees):
    """Queries [T, 4, d], keys and values [T, 2, d], head by head."""
    out = torch.zeros_like(q)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[-1])
        out[:, head] = scores.masked_fill(~sees, -math.inf).softmax(-1) @ v[:, shared]
    return out.flatten(1)


def transformer(w, names, ids, theta, eps, sees, qk_norm=False):
    """Logits [T, V] in float64 by a pre-norm transformer with rotary positions and SwiGLU;
    `names` says how the file calls its matrices."""
    ids = torch.tensor(ids)
    w = {name: value.double() for name, value in w.items()}
    x = w[names["embed"] + ".weight"][ids]

    def linear(x, name):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    for layer in range(2):
        at = {key: value.format(layer) for key, value in names.items()}
        h = norm(x, w[at["norm1"] + ".weight"], eps)
        q = linear(h, at["q"]).view(len(ids), HEADS, -1)
        k = linear(h, at["k"]).view(len(ids), KV_HEADS, -1)
        v = linear(h, at["v"]).view(len(ids), KV_HEADS, -1)
        if qk_norm:
            q, k = norm(q, w[at["qn"] + ".weight"], eps), norm(k, w[at["kn"] + ".weight"], eps)
        mixed = attention(rotate(q, theta), rotate(k, theta), v, sees)
        x = x + linear(mixed, at["o"])
        h = norm(x, w[at["norm2"] + ".weight"], eps)
        gate = linear(h, at["gate"])
        x = x + linear(gate * torch.sigmoid(gate) * linear(h, at["up"]), at["down"])
    x = norm(x, w[names["last"] + ".weight"], eps)
    return x @ w[names["head"] + ".weight"].T


LLADA = {
    "embed": "model.transformer.wte",
    "last": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "norm1": "model.transformer.blocks.{}.attn_norm",
    "norm2": "model.transformer.blocks.{}.ff_norm",
    "q": "model.transformer.blocks.{}.q_proj",
    "k": "model.transformer.blocks.{}.k_proj",
    "v": "model.transformer.blocks.{}.v_proj",
    "o": "model.transformer.blocks.{}.attn_out",
    "gate": "model.transformer.blocks.{}.ff_proj",
    "up": "model.transformer.blocks.{}.up_proj",
    "down": "model.transformer.blocks.{}.ff_out",
}
QWEN = {
    "embed": "model.embed_tokens",
    "last": "model.norm",
    "head": "lm_head",
    "norm1": "model.layers.{}.input_layernorm",
    "norm2": "model.layers.{}.post_attention_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "o": "model.layers.{}.self_attn.o_proj",
    "qn": "model.layers.{}.self_attn.q_norm",
    "kn": "model.layers.{}.self_attn.k_norm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}


def full(length):
    return torch.ones(length, length, dtype=torch.bool)


def by_blocks(length, size):
    return torch.tensor([[j // size <= i // size for j in range(length)] for i in range(length)])


def expected_logits(kind, folder):
    w = load_file(folder / "model.safetensors")
    if kind == "llada":
        return transformer(w, LLADA, IDS, 500000.0, 1e-5, full(len(IDS)))
    if kind == "dream":  # the logits of token i stand at i - 1, those of the first at its own place
        own = transformer(w, QWEN, IDS, 1000000.0, 1e-6, full(len(IDS)))
        return torch.stack([own[max(i - 1, 0)] for i in range(len(IDS))])
    return transformer(w, QWEN, IDS, 1000000.0, 1e-6, by_blocks(len(IDS), 4), qk_norm=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llada", "dream", "sdar"])
def test_logits_are_those_of_the_formulas(tmp_path, kind, attention):
    folder = write_random_masked(tmp_path, kind)
    model = load_masked_lm(ModelConfig(path=str(folder)))
    model.model.set_attn_implementation(attention)
    expected_TV = expected_logits(kind, folder)
    expected_TV[:, 262] = -math.inf
    actual_TV = model.logits(Canvas(torch.tensor([IDS])))[0].detach().double()
    assert expected_TV[:, :262].std() > 0.5  # not flat
    torch.testing.assert_close(actual_TV, expected_TV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llada", "dream", "sdar"])
def test_what_is_saved_is_in_the_checkpoints_own_layout(tmp_path, kind, tied):
    source = write_random_masked(tmp_path / "a", kind, tied=tied)
    (source / "modeling_own.py").write_text("raise RuntimeError('not to be run')\n")
    model = load_masked_lm(ModelConfig(path=str(source)))
    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(x / "model.safetensors") for x in (source, tmp_path / "b"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((x / "config.json").read_text()) for x in (source, tmp_path / "b")]
    assert configs[0] == configs[1]
    assert (tmp_path / "b/modeling_own.py").read_text().startswith("raise")
    again = load_masked_lm(ModelConfig(path=str(tmp_path / "b")))
    canvas = Canvas(torch.tensor([IDS]))
    assert torch.equal(again.logits(canvas), model.logits(canvas))


def test_a_saved_config_names_the_dtype_the_mask_and_the_blocks_that_were_used(tmp_path):
    source = write_random_masked(tmp_path / "a", "sdar")
    model = load_masked_lm(ModelConfig(path=str(source), dtype="bfloat16"), block_size=8)
    model.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert (config["torch_dtype"], config["block_size"]) == ("bfloat16", 8)
    assert load_masked_lm(ModelConfig(path=str(tmp_path / "b"))).block_size == 8


def test_blocks_given_to_a_model_without_any_come_back_from_disk(tmp_path):
    source = write_random_masked(tmp_path / "a", "llada")
    model = load_masked_lm(ModelConfig(path=str(source)), block_size=3)
    model.save_pretrained(tmp_path / "b")
    assert load_masked_lm(ModelConfig(path=str(tmp_path / "b"))).block_size == 3
    write_random_masked(tmp_path / "c", "sdar")
    full = load_masked_lm(ModelConfig(path=str(tmp_path / "c")), block_size=0)
    full.save_pretrained(tmp_path / "d")
    assert load_masked_lm(ModelConfig(path=str(tmp_path / "d"))).block_size == 0


def llada_config(**fields):
    needed = {name: value for name, value in LLADA_SWITCHES.items() if value is not None}
    shape = dict(model_type="llada", d_model=8, n_heads=2, n_layers=1, vocab_size=20)
    return shape | {"max_sequence_length": 16} | needed | fields


@pytest.mark.parametrize(
    "field",
    [
        dict(block_type="sequential"), dict(block_group_size=2), dict(layer_norm_type="default"),
        dict(layer_norm_with_affine=False), dict(bias_for_layer_norm=True), dict(clip_qkv=8.0),
        dict(attention_layer_norm=True), dict(input_emb_norm=True), dict(include_bias=True),
        dict(include_qkv_bias=True), dict(activation_type="gelu"), dict(alibi=True),
        dict(rope=False), dict(scale_logits=True),
    ],
)  # fmt: skip
def test_a_switch_that_changes_the_maths_is_refused(field):
    [name] = field
    with pytest.raises(ModelError, match=f"{name}=.*use a checkpoint"):
        Layout(FAMILIES["llada"], llada_config(**field), {}).native_config()


@pytest.mark.parametrize("name", ["block_type", "layer_norm_type", "activation_type", "rope"])
def test_a_silent_config_is_what_its_own_code_takes_it_for(name):
    config = llada_config()
    del config[name]
    with pytest.raises(ModelError, match=f"{name}="):
        Layout(FAMILIES["llada"], config, {}).native_config()


def test_a_window_of_dream_is_refused():
    config = {"model_type": "Dream", "use_sliding_window": True}
    with pytest.raises(ModelError, match="use_sliding_window=True"):
        Layout(FAMILIES["Dream"], config, {}).native_config()


def test_a_config_without_a_shape_is_refused():
    config = llada_config()
    del config["n_layers"]
    with pytest.raises(ModelError, match="lacks 'n_layers'"):
        Layout(FAMILIES["llada"], config, {}).native_config()


def test_llada_shapes():
    def native(**fields):
        return Layout(FAMILIES["llada"], llada_config(**fields), {}).native_config()

    assert native().num_key_value_heads == 2
    assert native(multi_query_attention=True).num_key_value_heads == 1
    assert native(n_kv_heads=1).num_key_value_heads == 1
    assert native().intermediate_size == 32  # four times the width
    assert native(mlp_hidden_size=24).intermediate_size == 24
    assert native(embedding_size=24).vocab_size == 24
    assert native(rope_theta=5e5).rope_parameters["rope_theta"] == 5e5


def test_names_go_there_and_back_and_unknown_ones_stay():
    family = FAMILIES["llada"]
    names = [
        "model.transformer.wte.weight", "model.transformer.ff_out.weight",
        "model.transformer.blocks.11.ff_out.weight", "model.transformer.blocks.2.attn_out.weight",
    ]  # fmt: skip
    native = [family.to_native(name) for name in names]
    assert native == [
        "model.embed_tokens.weight", "lm_head.weight",
        "model.layers.11.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight",
    ]  # fmt: skip
    assert [family.to_source(name) for name in native] == names
    for name in (
        "model.transformer.blocks.0.k_norm.weight",
        "other",
        "model.blocks.0.ff_out.weight",
    ):
        assert family.to_native(name) == name == family.to_source(name)
