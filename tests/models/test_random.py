"""Random model folders: load with the plain Auto classes, keyed by the seed, text comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.models.errors import ModelError
from rlalign.models.random import ARCHITECTURES, write_random_model
from rlalign.models.tokenizer import TAGS, build_tokenizer

TEXT = "84-9+8=?<think>84-9=75\n75+8=83</think><answer>83</answer>"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_folder_loads_with_the_auto_classes(tmp_path, architecture, tied):
    path = write_random_model(tmp_path / "m", architecture, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared is tied
    assert len(tokenizer) == model.config.vocab_size == 262
    assert model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == build_tokenizer()(TEXT)["input_ids"]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == TEXT
    logits = model(torch.tensor([ids])).logits
    assert logits.isfinite().all() and logits.std() > 0.1


def test_weights_are_keyed_by_the_seed_and_leave_the_generator_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    paths = [
        write_random_model(tmp_path / name, seed=seed)
        for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    ]
    assert torch.equal(before, torch.get_rng_state())
    a, b, c = ((path / "model.safetensors").read_bytes() for path in paths)
    assert a == b != c


def test_wider_vocabulary_and_config_overrides(tmp_path):
    path = write_random_model(tmp_path / "m", "gemma2", vocab=300, final_logit_softcapping=5.0)
    model = AutoModelForCausalLM.from_pretrained(path)
    logits = model(torch.tensor([[7, 8, 9]])).logits
    assert logits.shape[-1] == 300 and logits.abs().max() <= 5.0


@pytest.mark.parametrize("kwargs", [{"architecture": "gpt9"}, {"vocab": 10}])
def test_impossible_requests_name_the_value(tmp_path, kwargs):
    with pytest.raises(ModelError, match=str(next(iter(kwargs.values())))):
        write_random_model(tmp_path / "m", **kwargs)
    assert not (tmp_path / "m").exists()


@given(st.text(max_size=40))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tags_are_one_token_and_ordinary_text():
    tokenizer = build_tokenizer()
    for tag in TAGS:
        assert len(tokenizer(tag)["input_ids"]) == 1
        assert tag not in tokenizer.all_special_tokens


def test_chat_template_of_one_user_turn_is_the_bare_question():
    tokenizer = build_tokenizer()
    turn = [{"role": "user", "content": "1+1=?"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text == "1+1=?"
    system = [{"role": "system", "content": "be brief"}, *turn]
    assert tokenizer.apply_chat_template(system, tokenize=False) == "be brief\n1+1=?"
