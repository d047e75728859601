"""Searches on a model of transformers: all of search_conformance.py, and what is HF's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.algos.latent import Ascent, LatentState
from rlalign.models.random import write_random_model
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Ascend, Choose, Draw, Latents
from rlalign.rollout.search_hf import HFSearch, read_head
from tests.rollout.search_conformance import CHECKS, CLOSE, Subject, write_model


@pytest.fixture(scope="module", params=["qwen2", "mistral"])
def subject(tmp_path_factory, request) -> Subject:
    path = write_model(tmp_path_factory.mktemp("model"), request.param)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    return Subject(HFSearch(model, tokenizer, max_batch_size=4), model, tokenizer)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_engine(subject: Subject, check):
    check(subject)


def adapted(path: Path, targets: list[str], **overrides):
    write_random_model(path, hidden=64, heads=2, kv_heads=1, max_positions=128, **overrides)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path),
        LoraConfig(r=4, lora_alpha=16, target_modules=targets),
    ).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=rng))
    return model, AutoTokenizer.from_pretrained(path)


def test_an_adapter_acts_on_draws_latents_and_the_head(tmp_path: Path):
    model, tokenizer = adapted(tmp_path, ["q_proj", "down_proj", "lm_head"], tied=False)
    with torch.no_grad():
        z_ND = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            read_head(model).logits(z_ND), model.get_output_embeddings()(z_ND), **CLOSE
        )
    ids = tuple(range(10, 40))
    requests = [
        Draw(ids, SamplingParams(12, temperature=0.0, num_top=2)), Choose(ids, (5, 6)),
        Latents(ids, 2, 20),
    ]  # fmt: skip
    drawn, choice, latent_ND = HFSearch(model, tokenizer).answer(requests)
    merged = HFSearch(model.merge_and_unload(), tokenizer)
    want_drawn, want_choice, want_ND = merged.answer(requests)
    assert drawn.ids == want_drawn.ids
    torch.testing.assert_close(torch.tensor(choice), torch.tensor(want_choice), **CLOSE)
    torch.testing.assert_close(latent_ND, want_ND, **CLOSE)


@pytest.mark.parametrize("fields", [{}, {"final_logit_softcapping": 2.0}])
def test_the_head_has_the_models_scale_and_cap(tmp_path: Path, fields):
    """Gemma caps its logits: a cap as low as this one changes the gradient."""
    write_random_model(tmp_path, "gemma2", max_positions=64, **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    engine = HFSearch(model, AutoTokenizer.from_pretrained(tmp_path))
    ids = tuple(range(10, 30))
    [latent_ND] = engine.answer([Latents(ids, 1, 20)])
    with torch.no_grad():
        want_NV = model(torch.tensor([ids])).logits[0, :-1]
    torch.testing.assert_close(read_head(model).logits(latent_ND), want_NV, **CLOSE)
    how = Ascent(lr=0.1, optimizer="sgd")
    tokens_N = want_NV.argmax(-1)
    [moved] = engine.answer([Ascend(LatentState.start(latent_ND, how), tokens_N, 1.0, how)])
    z_ND = latent_ND.clone().requires_grad_()
    cap = model.config.final_logit_softcapping
    logits_NV = cap * torch.tanh(model.get_output_embeddings()(z_ND) / cap)
    logits_NV.log_softmax(-1).gather(1, tokens_N[:, None]).sum().backward()
    assert z_ND.grad is not None
    torch.testing.assert_close(moved.state.latent_ND, latent_ND + 0.1 * z_ND.grad, **CLOSE)


def test_the_model_is_left_as_it_is(tmp_path: Path):
    model, tokenizer = adapted(tmp_path, ["q_proj"])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    state = torch.get_rng_state()
    [latent_ND] = HFSearch(model, tokenizer).answer([Latents((5, 6, 7), 1, 3)])
    how = Ascent()
    HFSearch(model, tokenizer).answer(
        [
            Draw((5, 6), SamplingParams(4), 1),
            Ascend(LatentState.start(latent_ND, how), torch.tensor([1, 2]), 1.0, how),
        ]
    )
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
