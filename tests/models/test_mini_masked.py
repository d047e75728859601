"""Mini diffusion language models: built once, the same for a seed, and worth training from."""

import dataclasses
import itertools

import torch
from safetensors.torch import load_file

from rlalign.config.schema import ModelConfig
from rlalign.models.load import load_tokenizer
from rlalign.models.masked_load import load_masked_lm
from rlalign.models.mini_masked import build_masked, masked_loss
from rlalign.models.tokenizer import build_letter_tokenizer
from rlalign.tasks.sort import SORT6

RECIPE = dataclasses.replace(SORT6.model, hidden=32, mlp=64, steps=40, batch_size=32)
TASK = dataclasses.replace(SORT6, model=RECIPE)


def build(folder, seed=0, task=TASK):
    return build_masked(task, seed, folder, lambda stage, done, total: None)


def test_letters_are_tokens_and_come_back():
    tokenizer = build_letter_tokenizer("01=")
    assert len(tokenizer) == 6  # pad, eos, mask, and the letters
    ids = tokenizer("10=")["input_ids"]
    assert len(set(ids)) == 3 and tokenizer.decode(ids) == "10="
    filled = [*ids, tokenizer.mask_token_id, tokenizer.eos_token_id]
    assert tokenizer.decode(filled, skip_special_tokens=True) == "10="


def test_a_built_model_loads_as_what_it_is(tmp_path):
    spec = ModelConfig(path=str(build(tmp_path)))
    lm, tokenizer = load_masked_lm(spec), load_tokenizer(spec)
    assert (lm.mask_id, lm.shift, lm.block_size) == (tokenizer.mask_token_id, False, 0)
    assert not lm.model.config.is_causal


def test_equal_seeds_give_equal_weights_and_others_others(tmp_path):
    one, again, other = (
        load_file(build(tmp_path / name, seed) / "model.safetensors")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_changed_recipe_is_another_folder_and_an_equal_one_is_not_built_again(tmp_path):
    first = build(tmp_path)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert build(tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    longer = dataclasses.replace(TASK, model=dataclasses.replace(RECIPE, steps=41))
    assert build(tmp_path, task=longer) != first


def test_training_beats_a_guess_among_the_digits(tmp_path):
    """Which costs ln 8 = 2.08 nats a token."""
    longer = dataclasses.replace(TASK, model=dataclasses.replace(RECIPE, steps=400))
    spec = ModelConfig(path=str(build(tmp_path, task=longer)))
    lm, tokenizer = load_masked_lm(spec), load_tokenizer(spec)
    batch = list(itertools.islice(RECIPE.demonstrations(9), 256))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        loss = masked_loss(lm.model, tokenizer, batch, lm.mask_id, generator)
    assert 0.5 < float(loss) < 1.8
