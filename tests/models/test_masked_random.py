"""Random checkpoints: complete, keyed by their seed, and of the kind that they say."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rlalign.config.schema import ModelConfig
from rlalign.models.errors import ModelError
from rlalign.models.load import load_tokenizer
from rlalign.models.masked_diffusion import Canvas
from rlalign.models.masked_load import load_masked_lm
from rlalign.models.masked_random import KINDS, write_random_masked

MODEL_TYPES = {
    "llada": "llada", "dream": "Dream", "sdar": "sdar", "native": "qwen2", "bert": "bert",
    "modernbert": "modernbert",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_with_its_tokenizer(tmp_path, kind):
    folder = write_random_masked(tmp_path, kind)
    assert json.loads((folder / "config.json").read_text())["model_type"] == MODEL_TYPES[kind]
    model = load_masked_lm(ModelConfig(path=str(folder)))
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert (
        (model.mask_id, model.vocab_size) == (tokenizer.mask_token_id, len(tokenizer)) == (262, 263)
    )
    canvas = Canvas(torch.tensor([[*tokenizer("3 1 2").input_ids, 262]]))
    logits_V = model.logits(canvas)[0, -1]
    assert logits_V[262] == -torch.inf and logits_V[:262].std() > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_weights_depend_on_the_seed_only(tmp_path, kind):
    state = torch.get_rng_state()
    weights = [
        load_file(write_random_masked(tmp_path / str(i), kind, seed=seed) / "model.safetensors")
        for i, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_overrides_and_blocks(tmp_path):
    folder = write_random_masked(tmp_path / "a", "native", block_size=4, mask_token_id=7, vocab=300)
    model = load_masked_lm(ModelConfig(path=str(folder)))
    assert (model.block_size, model.mask_id, model.vocab_size) == (4, 7, 300)
    folder = write_random_masked(tmp_path / "b", "sdar")
    assert load_masked_lm(ModelConfig(path=str(folder))).block_size == 4


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ModelError, match="kind 'gpt' is none of llada"):
        write_random_masked(tmp_path, "gpt")
    with pytest.raises(ModelError, match="vocab=100 is smaller than the tokenizer's 263"):
        write_random_masked(tmp_path, vocab=100)
