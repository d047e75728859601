"""A LoRA adapter on the output head: log-probs from hidden states against the model's own logits
through PEFT, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlalign.config.schema import KernelsConfig
from rlalign.models.errors import ModelError
from rlalign.models.head import build_head
from rlalign.models.lora import adapters_off, merged_weights
from tests.kernels.watch import Watch

VOCAB, WIDTH, RANK = 67, 16, 3
TARGETS = ["q_proj", "lm_head"]
TEMPERATURE = 0.7

FAMILIES = {
    "qwen2": dict(),
    "phi": dict(),  # a head with a bias
    "gemma2": dict(head_dim=8, final_logit_softcapping=3.0),
    "cohere": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=3.0),
}


def make_model(family: str = "qwen2", *, tied: bool = False, **fields) -> PreTrainedModel:
    """A frozen random model in float64."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=24, initializer_range=0.2, bos_token_id=None,
        eos_token_id=0, pad_token_id=None, tie_word_embeddings=tied, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def adapt(model: PreTrainedModel, name: str = "default", *, seed: int = 1, **options) -> None:
    """Attach an adapter that does something: PEFT's own starts with B = 0."""
    settings = {"r": RANK, "lora_alpha": 5, "target_modules": TARGETS} | options
    model.add_adapter(LoraConfig(task_type="CAUSAL_LM", **settings), name)
    rng = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=rng).double() * 0.3


def own_outputs(model: PreTrainedModel, ids_T: torch.Tensor):
    """log-probs of the next tokens and entropies, from the model's logits."""
    logits_TV = model(ids_T[None], use_cache=False).logits[0, :-1] / TEMPERATURE
    logp_TV = logits_TV - torch.logsumexp(logits_TV, -1, keepdim=True)
    return logp_TV[range(len(ids_T) - 1), ids_T[1:]], -(logp_TV.exp() * logp_TV).sum(-1)


def head_outputs(model: PreTrainedModel, ids_T: torch.Tensor, head=None):
    """The same from hidden states."""
    head = head or build_head(model, KernelsConfig(chunk_size=4))
    hidden_TD = model.base_model(ids_T[None], use_cache=False).last_hidden_state[0, :-1]
    out = head(hidden_TD, ids_T[1:], TEMPERATURE, True)
    return out.logp, out.entropy


def gradients(outputs: Sequence[torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(9)
    loss = sum((torch.randn(x.shape, generator=rng) * x).sum() for x in outputs)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, found, strict=True))


@pytest.fixture
def ids_T() -> torch.Tensor:
    return torch.randint(0, VOCAB, (12,), generator=torch.Generator().manual_seed(2))


def assert_equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_those_of_the_models_own_logits(family, ids_T):
    """Before bias, scale and cap, as the matrix it changes; A and B and the layers below."""
    model = make_model(family, **FAMILIES[family])
    without = own_outputs(model, ids_T)
    adapt(model)
    own, ours = own_outputs(model, ids_T), head_outputs(model, ids_T)
    assert (own[0] - without[0]).abs().max() > 0.1
    assert_equal(ours, own)
    wanted, found = gradients(own, model), gradients(ours, model)
    assert {name.split(".")[-4] for name in wanted} == set(TARGETS)
    for name, gradient in wanted.items():
        assert gradient.norm() > 1e-3, name
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10, msg=name)


def test_rank_stabilised_scaling(ids_T):
    """alpha / sqrt(rank), Kalajdzievski 2023, arXiv 2312.03732."""
    plain, stabilised = make_model(), make_model()
    adapt(plain)
    adapt(stabilised, use_rslora=True)
    ours = head_outputs(stabilised, ids_T)
    assert_equal(ours, own_outputs(stabilised, ids_T))
    assert (ours[0] - head_outputs(plain, ids_T)[0]).abs().max() > 0.1


def test_the_frozen_matrix_has_no_gradient(ids_T):
    """Nothing of its shape is made in the backward pass, which with a trained one would be."""

    def made(model: PreTrainedModel) -> int:
        outputs, count = head_outputs(model, ids_T), 0
        kept = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def see(tensor: torch.Tensor) -> None:
            nonlocal count
            own = tensor.untyped_storage().data_ptr() in kept
            count += not own and tensor.numel() >= VOCAB * WIDTH

        with Watch(see):
            gradients(outputs, model)
        return count

    model = make_model()
    adapt(model)
    assert made(model) == 0
    model.lm_head.base_layer.weight.requires_grad_(True)
    assert made(model) > 0


def test_adapters_switched_off_are_off_in_the_head_too(ids_T):
    model = make_model()
    base = own_outputs(model, ids_T)
    adapt(model)
    head = build_head(model, KernelsConfig())
    on = head_outputs(model, ids_T, head)
    with adapters_off(model):
        assert_equal(head_outputs(model, ids_T, head), base)
    model.disable_adapters()
    assert_equal(head_outputs(model, ids_T, head), base)
    model.enable_adapters()
    assert_equal(head_outputs(model, ids_T, head), on)
    assert (on[0] - base[0]).abs().max() > 0.1


def test_of_several_adapters_the_active_one_counts(ids_T):
    model = make_model()
    adapt(model, "first")
    adapt(model, "second", seed=7, r=RANK + 2)
    assert model.active_adapters() == ["second"]
    head = build_head(model, KernelsConfig())
    assert_equal(head_outputs(model, ids_T, head), own_outputs(model, ids_T))
    merged = make_model()
    merged.load_state_dict({k: v.double() for k, v in merged_weights(model)}, strict=True)
    for ours, theirs in zip(own_outputs(merged, ids_T), own_outputs(model, ids_T), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # merged in float32
    model.set_adapter("first")
    with pytest.raises(ModelError, match=r"'second'; now \['first'\] are active"):
        head_outputs(model, ids_T, head)
    assert_equal(head_outputs(model, ids_T), own_outputs(model, ids_T))
    model.set_adapter(["first", "second"])
    with pytest.raises(ModelError, match="2 active LoRA adapters"):
        build_head(model, KernelsConfig())


def test_an_adapter_merged_into_the_head_is_an_error():
    model = make_model()
    adapt(model)
    head = build_head(model, KernelsConfig())
    model.lm_head.merge()
    with pytest.raises(ModelError, match="build the policy again"):
        head(torch.zeros(1, WIDTH).double(), torch.tensor([1]))
    with pytest.raises(ModelError, match="not merged"):
        build_head(model, KernelsConfig())


REFUSED = {
    "use_dora": (True, "more than scaling B A"),
    "lora_dropout": (0.1, "has dropout"),
    "lora_bias": (True, "has a bias"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_adapters_that_the_head_cannot_follow_are_refused(option):
    value, said = REFUSED[option]
    model = make_model("phi")
    adapt(model, **{option: value})
    with pytest.raises(ModelError, match=f"{said}.*or leave the head out of its target modules"):
        build_head(model, KernelsConfig())


def test_a_head_that_is_not_linear_is_refused():
    model = make_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="Sequential, not a plain linear"):
        build_head(model, KernelsConfig())


@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_one_side_of_a_tied_weight_is_refused(side, ids_T):
    model = make_model(tied=True)
    adapt(model, target_modules=["q_proj", side])
    with pytest.raises(ModelError, match=r"tie_word_embeddings.*model\.lora\.target_modules"):
        build_head(model, KernelsConfig())
    spared = make_model(tied=True)
    adapt(spared, target_modules=["q_proj"])
    assert_equal(head_outputs(spared, ids_T), own_outputs(spared, ids_T))
