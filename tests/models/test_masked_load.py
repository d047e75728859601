"""Loading masked-diffusion models: what is recognised, where the mask token is from, and what is
refused with which words."""

import json
import shutil

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining

from rlalign.config.schema import ModelConfig
from rlalign.models.errors import ModelError
from rlalign.models.masked_diffusion import Canvas
from rlalign.models.masked_layout import FAMILIES
from rlalign.models.masked_load import load_masked_lm
from rlalign.models.masked_random import write_random_masked
from rlalign.models.random import write_random_model

CANVAS = Canvas(torch.tensor([[7, 262, 33, 262, 90, 14]]))


def load(folder, **options):
    return load_masked_lm(ModelConfig(path=str(folder), **options))


def edit_config(folder, **fields):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "shift", "block_size"),
    [("llada", False, 0), ("dream", True, 0), ("sdar", False, 4), ("native", False, 0),
     ("bert", False, 0)],
)  # fmt: skip
def test_each_kind_is_known_by_its_config(tmp_path, kind, shift, block_size):
    model = load(write_random_masked(tmp_path, kind))
    assert (model.mask_id, model.shift, model.block_size) == (262, shift, block_size)
    assert not model.training


def test_constants_of_the_published_models():
    """BGPO specification, section 11.1."""
    assert {name: family.mask_id for name, family in FAMILIES.items()} == {
        "llada": 126336, "Dream": 151666, "sdar": 151669,
    }  # fmt: skip


def test_shift_and_blocks_of_a_native_model_come_back(tmp_path):
    source = write_random_masked(tmp_path / "a", "native", block_size=2, diffusion_shift=True)
    model = load(source)
    assert (model.shift, model.block_size) == (True, 2)
    model.save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b")
    assert (again.shift, again.block_size, again.mask_id) == (True, 2, 262)
    assert torch.equal(again.logits(CANVAS), model.logits(CANVAS))


def test_bfloat16(tmp_path):
    model = load(write_random_masked(tmp_path, "llada"), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.logits(CANVAS).dtype == torch.float32


def test_the_mask_token_is_the_configs_then_the_tokenizers_then_the_familys(tmp_path):
    folder = write_random_masked(tmp_path, "llada")
    edit_config(folder, mask_token_id=9)
    assert load(folder).mask_id == 9
    edit_config(folder, mask_token_id=None)
    assert load(folder).mask_id == 262
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"mask token 126336 is not in the vocabulary.*263 tokens"):
        load(folder)


def test_without_any_mask_token_the_fix_is_named(tmp_path):
    folder = write_random_masked(tmp_path, "bert")
    edit_config(folder, mask_token_id=None)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"names a mask token: set mask_token_id in config\.json"):
        load(folder)


@pytest.mark.parametrize("kind", ["llada", "native"])
def test_missing_and_unused_tensors_are_named_as_in_the_file(tmp_path, kind):
    names = {
        "llada": "model.transformer.blocks.1.attn_out",
        "native": "model.layers.1.self_attn.o_proj",
    }
    folder = write_random_masked(tmp_path, kind)
    whole = (folder / "model.safetensors").read_bytes()
    edit_weights(folder, lambda w: w.pop(f"{names[kind]}.weight"))
    with pytest.raises(ModelError, match=rf"lack 1 of .* the first '{names[kind]}\.weight'"):
        load(folder)
    (folder / "model.safetensors").write_bytes(whole)
    edit_weights(folder, lambda w: w.update({f"{names[kind]}.bias": torch.zeros(32)}))
    with pytest.raises(ModelError, match=rf"hold 1 tensors .* the first '{names[kind]}\.bias'"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    folder = write_random_masked(tmp_path, "llada")
    edit_config(folder, mlp_hidden_size=64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_several_files_are_read_as_their_index_says(tmp_path):
    folder = write_random_masked(tmp_path, "llada")
    expected = load(folder).logits(CANVAS)
    weights = load_file(folder / "model.safetensors")
    save_torch_state_dict(weights, folder, max_shard_size=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    save_file({"leftover": torch.zeros(1)}, folder / "other.safetensors")
    assert torch.equal(load(folder).logits(CANVAS), expected)


def test_heads_for_other_tasks_in_an_encoders_file_are_left_out(tmp_path):
    shape = dict(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertForPreTraining(BertConfig(**shape, intermediate_size=16)).save_pretrained(tmp_path)
    edit_config(tmp_path, mask_token_id=29)
    assert load(tmp_path).vocab_size == 30


def test_a_causal_model_is_refused(tmp_path):
    folder = write_random_model(tmp_path, "qwen2")
    with pytest.raises(ModelError, match=r'causal qwen2 model.*"is_causal": false'):
        load(folder)
    edit_config(folder, is_causal=False, mask_token_id=3)
    assert load(folder).mask_id == 3


def test_a_native_model_with_a_window_is_refused(tmp_path):
    folder = write_random_model(
        tmp_path, "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0
    )
    edit_config(folder, is_causal=False, mask_token_id=3)
    with pytest.raises(ModelError, match=r"window of 4 tokens.*use_sliding_window to false"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="llada2_moe"), "mixture of experts"),
        (dict(model_type="diffusion_gemma"), "has no mask token: it replaces tokens"),
        (dict(model_type="gpt2"), "holds a gpt2 model, and rlalign knows no way to fill in masks"),
        (dict(model_type="bart", is_encoder_decoder=True), "knows no way to fill in masks"),
        (dict(model_type="bert", is_decoder=True), "knows no way to fill in masks"),
        (dict(block_type="sequential"), "block_type='sequential'"),
    ],
)
def test_models_that_cannot_be_run_are_refused(tmp_path, fields, message):
    folder = write_random_masked(tmp_path, "llada")
    edit_config(folder, **fields)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_folders_that_are_not_complete(tmp_path):
    folder = write_random_masked(tmp_path / "a", "llada")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load(folder)
    folder = write_random_masked(tmp_path / "b", "llada")
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(ModelError, match="pickles"):
        load(folder)
    with pytest.raises(ModelError, match="no such folder"):
        load(tmp_path / "c")


REMOTE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput
class OwnConfig(PreTrainedConfig):
    model_type = "own_masked"
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 8)
        self.out = nn.Linear(8, config.vocab_size)
        self.post_init()
    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        mixed = x.cumsum(1) if self.config.causal else x.sum(1, keepdim=True)
        return MaskedLMOutput(logits=self.out(x + mixed).tanh())
"""


@pytest.fixture
def remote(tmp_path):
    torch.manual_seed(0)
    weights = {"embed.weight": torch.randn(20, 8), "out.weight": torch.randn(20, 8)}
    save_file(
        {**weights, "out.bias": torch.randn(20)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "modeling_own.py").write_text(REMOTE)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForMaskedLM": "modeling_own.OwnModel"}
    config = {"model_type": "own_masked", "vocab_size": 20, "auto_map": auto, "causal": False}
    (tmp_path / "config.json").write_text(json.dumps(config | {"mask_token_id": 19}))
    return tmp_path


def test_code_that_ships_with_a_model_runs_only_where_it_is_trusted(remote):
    with pytest.raises(ModelError, match=r"Read that code, then set model\.trust_remote_code=true"):
        load(remote)
    model = load(remote, trust_remote_code=True)
    ids = torch.tensor([[3, 19, 4]])
    weights = load_file(remote / "model.safetensors")
    x = weights["embed.weight"][ids[0]]
    logits = (x + x.sum(0)) @ weights["out.weight"].T + weights["out.bias"]
    torch.testing.assert_close(model.logits(Canvas(ids))[0, :, :19], logits.tanh()[:, :19])
    place = torch.tensor([1])
    logp = model.logp(Canvas(ids), 0 * place, place, torch.tensor([5]), 0.5)
    expected = (logits.tanh()[1, :19] / 0.5).log_softmax(-1)[5]
    torch.testing.assert_close(logp[0], expected)


def test_trusted_code_that_is_causal_is_refused(remote):
    edit_config(remote, causal=True)
    with pytest.raises(ModelError, match="OwnModel is causal"):
        load(remote, trust_remote_code=True)


def test_code_beside_a_known_checkpoint_is_not_run(tmp_path):
    folder = write_random_masked(tmp_path, "llada")
    (folder / "modeling_llada.py").write_text("raise RuntimeError('run')\n")
    edit_config(folder, auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    assert load(folder, trust_remote_code=True).mask_id == 262
    shutil.rmtree(folder)
