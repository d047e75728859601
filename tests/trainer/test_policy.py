"""The policy against plain loops over the model's own logits."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlalign.config.schema import KernelsConfig, LoraConfig, ModelConfig
from rlalign.models.errors import ModelError
from rlalign.models.random import write_random_model
from rlalign.trainer.policy import Policy
from rlalign.types import TrainBatch
from tests.kernels.watch import Watch

VOCAB = 262
ADAPTER_FILE = "adapter_model.safetensors"
SHAPES = ((5, 9), (3, 0), (1, 14), (8, 2), (2, 9), (6, 5), (4, 1))  # prompt, completion


def batch(shapes=SHAPES, seed: int = 0, groups: bool = False) -> TrainBatch:
    """With `groups` rows whose prompts have the same length have the same prompt."""
    rng = torch.Generator().manual_seed(seed)
    length_B = torch.tensor([completion for _, completion in shapes], dtype=torch.long)
    width = int(length_B.max()) if len(shapes) else 0
    mask_BT = (torch.arange(width) < length_B[:, None]).float()
    sequences = [
        tuple(torch.randint(0, VOCAB, (p + c,), generator=rng).tolist()) for p, c in shapes
    ]
    if groups:
        first = {p: row[:p] for (p, _), row in zip(shapes, sequences, strict=True)}
        sequences = [first[p] + row[p:] for (p, _), row in zip(shapes, sequences, strict=True)]
    return TrainBatch(
        sequences=tuple(sequences),
        completion_len_B=length_B,
        group_id_B=torch.zeros(len(shapes), dtype=torch.long),
        mask_BT=mask_BT,
        reward_B=torch.zeros(len(shapes)),
        logp_rollout_BT=torch.zeros_like(mask_BT),
        weight_BT=torch.randn(mask_BT.shape, generator=rng) * mask_BT,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", layers=3)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """The same with a head of its own, which an adapter may target."""
    folder = tmp_path_factory.mktemp("models") / "untied"
    return write_random_model(folder, "qwen2", layers=3, tied=False)


WITH_HEAD = r".*\.\w+_proj|lm_head"
TARGETS = pytest.mark.parametrize("targets", ["all-linear", WITH_HEAD], ids=["layers", "and head"])


def build(folder, *, packing=True, with_reference=False, lora: LoraConfig | None = None, **fields):
    config = ModelConfig(path=str(folder), lora=lora or LoraConfig(), **fields)
    return Policy.from_config(config, packing=packing, with_reference=with_reference)


def own_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def reference(model, rows: TrainBatch, temperature: float):
    """Log-probs and entropies row by row from the model's own logits, in float64."""
    logp, entropy = {}, {}
    for b, sequence in enumerate(rows.sequences):
        logits = model(torch.tensor([sequence])).logits[0].double() / temperature
        for t in range(int(rows.completion_len_B[b])):
            place = len(sequence) - int(rows.completion_len_B[b]) + t
            dist = torch.distributions.Categorical(logits=logits[place - 1])
            logp[b, t] = dist.log_prob(torch.tensor(sequence[place]))
            entropy[b, t] = dist.entropy()
    cells = [(b, t) for b in range(len(rows)) for t in range(rows.mask_BT.shape[1])]
    zero = torch.zeros((), dtype=torch.float64)
    return [
        torch.stack([values.get(cell, zero) for cell in cells]).view(rows.mask_BT.shape)
        for values in (logp, entropy)
    ]


def gradient(policy: Policy, parts: list[TrainBatch], entropy: float = 0.3) -> torch.Tensor:
    """Of sum w * logp + entropy bonus, accumulated over micro-batches."""
    policy.zero_grad()
    for part in parts:
        out = policy(part, 0.9, entropy=True)
        loss = (part.weight_BT * out.logp_BT).sum()
        (loss + entropy * (part.weight_BT * out.entropy_BT).sum()).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# prompts of 5, 3 and 1 tokens shared by several rows, one of 8 by none; completions of 0 to 14
GROUPS = ((5, 9), (3, 0), (1, 14), (8, 2), (5, 1), (1, 1), (5, 12), (3, 4), (1, 3), (3, 1), (3, 0))


@pytest.mark.parametrize("rows", [batch(), batch(GROUPS, groups=True)], ids=["rows", "groups"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_entropies_equal_the_models_own(folder, packing, temperature, rows):
    out = build(folder, packing=packing)(rows, temperature, entropy=True)
    logp_BT, entropy_BT = reference(own_model(folder), rows, temperature)
    torch.testing.assert_close(out.logp_BT.double(), logp_BT, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.entropy_BT.double(), entropy_BT, atol=2e-5, rtol=0)
    assert (out.logp_BT[rows.mask_BT == 0] == 0).all()


@pytest.mark.parametrize("rows", [batch(), batch(GROUPS, groups=True)], ids=["rows", "groups"])
def test_gradients_equal_the_models_own(folder, rows):
    policy, own = build(folder), own_model(folder)
    logp_BT, entropy_BT = reference(own, rows, 0.9)
    (rows.weight_BT * (logp_BT + 0.3 * entropy_BT)).sum().backward()
    want = torch.cat([p.grad.flatten() for p in own.parameters()])
    assert relative(gradient(policy, [rows]), want) <= 5e-6


def test_a_shared_prompt_goes_through_the_model_once(folder):
    rows = batch(((20, 5), (20, 7), (20, 1), (6, 4)), groups=True)
    policy, seen = build(folder), []
    policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape[:-1].numel())
    )
    policy(rows)
    assert seen == [20 + 4 + 6 + 0 + 9]  # each completion without its last token


def test_training_never_makes_the_logits_of_all_tokens(folder):
    """Forward and backward of the current policy, and the forward passes of old log-probs and of
    the reference: whatever is as wide as the vocabulary has a chunk of rows, or is the head."""
    rows, chunk = batch(((20, 30), (20, 41), (20, 25)), groups=True), 8
    config = ModelConfig(path=str(folder))
    policy = Policy.from_config(
        config, with_reference=True, kernels=KernelsConfig(chunk_size=chunk)
    )
    shapes = set()
    with Watch(lambda tensor: shapes.add(tuple(tensor.shape))):
        gradient(policy, [rows])
        policy.reference_logp(rows)
        with torch.no_grad():
            policy(rows)
    width = policy.model.config.hidden_size
    wide = {shape for shape in shapes if VOCAB in shape} - {(VOCAB, width), (width, VOCAB)}
    assert wide and max(math.prod(shape) for shape in wide) == chunk * VOCAB


@pytest.mark.parametrize("rows", [batch(), batch(GROUPS, groups=True)], ids=["rows", "groups"])
def test_splits_packing_and_order_do_not_change_the_gradient(folder, rows):
    policy = build(folder)
    whole = gradient(policy, [rows])
    order = [6, 2, 0, 4, 1, 5, 3, *range(7, len(rows))]
    splits = {
        "order": [rows.rows(order)],
        "one row each": [rows.rows([i]) for i in range(len(rows))],
        "two halves": [rows.rows(order[:3]), rows.rows(order[3:])],
        "with an empty part": [rows.rows(order[:3]), rows.rows([]), rows.rows(order[3:])],
    }
    for name, parts in splits.items():
        assert relative(gradient(policy, parts), whole) <= 1e-6, name
    padded = build(folder, packing=False)
    assert relative(gradient(padded, [rows]), whole) <= 1e-6
    assert relative(gradient(padded, splits["two halves"]), whole) <= 1e-6


def test_gradient_checkpointing_does_not_change_the_gradient(folder):
    plain = gradient(build(folder), [batch()])
    checkpointed = gradient(build(folder, gradient_checkpointing=True), [batch()])
    assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("shapes", [(), ((3, 0), (2, 0))], ids=["no rows", "no completion tokens"])
@pytest.mark.parametrize("targets", [None, "all-linear", WITH_HEAD], ids=["full", "lora", "head"])
def test_an_empty_batch_gives_every_trainable_parameter_a_zero_gradient(untied, shapes, targets):
    policy = build(untied, lora=LoraConfig(rank=2, target_modules=targets) if targets else None)
    rows = batch(shapes)
    out = policy(rows, 1.0, entropy=True)
    assert out.logp_BT.shape == out.entropy_BT.shape == rows.mask_BT.shape
    (out.logp_BT.sum() + out.entropy_BT.sum()).backward()
    trainable = [p for p in policy.parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None and not p.grad.any() for p in trainable)


def write_family(path: Path, family: str, **fields) -> Path:
    """Families whose logits are scaled or capped, beyond those of `write_random_model`."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, initializer_range=0.2, bos_token_id=None,
        eos_token_id=0, pad_token_id=None, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


FAMILIES = {
    "gemma2": dict(head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    "gemma3_text": dict(head_dim=8, final_logit_softcapping=2.0, sliding_window=4),
    "cohere": dict(logit_scale=0.3),
    "cohere2": dict(logit_scale=0.3, sliding_window=4),
    "granite": dict(logits_scaling=3.0, attention_multiplier=0.4),
    "phi": dict(),  # a head with a bias
    "qwen3": dict(head_dim=8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_transform_their_logits(tmp_path, family):
    path = write_family(tmp_path, family, **FAMILIES[family])
    if family == "phi":
        model = own_model(path)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(path)
    own = own_model(path)
    if family == "gemma2":
        own.set_attn_implementation("eager")  # transformers' sdpa leaves the attention cap out
    rows = batch()
    logp_BT, _ = reference(own, rows, 0.8)
    for packing in (True, False):
        out = build(path, packing=packing)(rows, 0.8)
        torch.testing.assert_close(out.logp_BT.double(), logp_BT, atol=3e-5, rtol=0)


def test_a_family_that_does_something_else_to_its_logits_is_refused(folder, monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

    inner = Qwen2ForCausalLM.forward

    def doubled(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", doubled)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM.*differ from its own"):
        build(folder)


def test_the_reference_is_the_initial_policy(folder):
    policy = build(folder, with_reference=True)
    rows = batch()
    before = policy(rows, 0.7).logp_BT.detach()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(policy.reference_logp(rows, 0.7), before, atol=1e-6, rtol=0)
    assert (policy(rows, 0.7).logp_BT - before).abs().max() > 0.01


def test_a_reference_that_was_not_loaded_is_an_error(folder):
    with pytest.raises(ModelError, match="with_reference=True"):
        build(folder).reference_logp(batch())


def test_the_reference_is_not_among_the_parameters(folder):
    with_it, without = build(folder, with_reference=True), build(folder)
    assert [n for n, _ in with_it.named_parameters()] == [n for n, _ in without.named_parameters()]


def trained_lora(folder, targets: str = "all-linear", **fields) -> Policy:
    lora = LoraConfig(rank=4, alpha=8.0, target_modules=targets)
    policy = build(folder, lora=lora, with_reference=True, **fields)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.1)
    return policy


@TARGETS
def test_lora_trains_adapters_only_and_its_reference_is_the_base(untied, targets):
    policy, rows = trained_lora(untied, targets), batch()
    base = build(untied)(rows).logp_BT
    assert all("lora_" in n for n, p in policy.named_parameters() if p.requires_grad)
    torch.testing.assert_close(policy.reference_logp(rows), base.detach(), atol=1e-6, rtol=0)
    assert (policy(rows).logp_BT - base).abs().max() > 0.01
    assert [p.requires_grad for n, p in policy.named_parameters() if "lora_" in n].count(False) == 0


@TARGETS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_adapters_does_not_depend_on_splits(untied, checkpointing, targets):
    policy, rows = trained_lora(untied, targets, gradient_checkpointing=checkpointing), batch()
    whole = gradient(policy, [rows])
    parts = gradient(policy, [rows.rows([5, 0, 1]), rows.rows([6, 2, 3, 4])])
    assert relative(parts, whole) <= 1e-6


@TARGETS
def test_the_gradient_of_adapters_equals_the_models_own(untied, targets):
    """With the adapter on the head alone too, where no layer below it has a gradient."""
    for chosen in (targets, "lm_head"):
        policy, rows = trained_lora(untied, chosen), batch()
        found = gradient(policy, [rows])
        policy.zero_grad()
        logp_BT, entropy_BT = reference(policy.model, rows, 0.9)
        (rows.weight_BT * (logp_BT + 0.3 * entropy_BT)).sum().backward()
        trained = [p.grad for p in policy.parameters() if p.requires_grad]
        assert all(grad.any() for grad in trained)
        assert relative(found, torch.cat([grad.flatten() for grad in trained])) <= 5e-6


@TARGETS
def test_a_fresh_adapter_changes_nothing(untied, targets):
    rows = batch()
    fresh = build(untied, lora=LoraConfig(rank=4, target_modules=targets))(rows).logp_BT
    torch.testing.assert_close(fresh, build(untied)(rows).logp_BT, atol=0, rtol=0)


@pytest.mark.parametrize(
    "tied, adapters",
    [(True, ""), (False, ""), (True, "all-linear"), (False, "all-linear"), (False, WITH_HEAD)],
)
def test_rollout_weights_and_saved_folder_load_into_a_plain_model(tmp_path, tied, adapters):
    folder = write_random_model(tmp_path / "m", "qwen2", tied=tied)
    policy, rows = trained_lora(folder, adapters) if adapters else build(folder), batch()
    with torch.no_grad():
        expected = policy(rows).logp_BT
    plain = own_model(folder)
    weights = {name: tensor.clone() for name, tensor in policy.named_rollout_weights()}
    assert set(weights) == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(weights, strict=False)
    plain.tie_weights()
    torch.testing.assert_close(reference(plain, rows, 1.0)[0].float(), expected, atol=3e-5, rtol=0)

    policy.save_pretrained(tmp_path / "saved")
    assert "rlalign" not in (tmp_path / "saved/config.json").read_text()
    saved = own_model(tmp_path / "saved")
    torch.testing.assert_close(reference(saved, rows, 1.0)[0].float(), expected, atol=3e-5, rtol=0)
    if adapters:
        assert all("lora_" in name for name in load_file(tmp_path / "saved/adapter" / ADAPTER_FILE))
        both = PeftModel.from_pretrained(own_model(folder), str(tmp_path / "saved/adapter"))
        torch.testing.assert_close(
            reference(both, rows, 1.0)[0].float(), expected, atol=3e-5, rtol=0
        )
    with torch.no_grad():  # saving left the policy as it was
        assert torch.equal(policy(rows).logp_BT, expected)


def test_adapters_on_layers_that_do_not_exist_are_an_error(folder):
    with pytest.raises(ModelError, match="target_modules"):
        build(folder, lora=LoraConfig(rank=2, target_modules="nothing_like_this"))


def test_adapters_on_a_tied_head_are_an_error(folder):
    with pytest.raises(ModelError, match=r"tie_word_embeddings.*model\.lora\.target_modules"):
        build(folder, lora=LoraConfig(rank=2, target_modules=WITH_HEAD))


def test_the_forward_pass_is_not_random(tmp_path):
    path = write_family(tmp_path, "phi", attention_dropout=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    policy = build(path)
    assert policy.training
    assert torch.equal(policy(batch()).logp_BT, policy(batch()).logp_BT)


def test_a_completion_without_a_prompt_is_refused(folder):
    with pytest.raises(ValueError, match="prompt token"):
        build(folder)(batch(((0, 4),)))


@pytest.mark.parametrize("targets", [None, WITH_HEAD], ids=["full", "head"])
def test_bfloat16_weights_give_float32_log_probs(untied, targets):
    rows, make = batch(), partial(trained_lora, targets=targets) if targets else build
    out = make(untied, dtype="bfloat16")(rows).logp_BT
    exact = make(untied)(rows).logp_BT
    assert out.dtype == torch.float32
    assert (out - exact).abs().mean() < 0.1
