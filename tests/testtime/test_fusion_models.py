"""Models that are fused: what they must have in common, and what may differ."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlalign.models.tokenizer import build_tokenizer
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.fusion_models import FusedModel, Member
from rlalign.testtime.logit_fusion import logit_fusion
from rlalign.testtime.open_fusion import open_fusion
from tests.testtime.fusion_cases import PROMPTS, TOKENIZER, greedy, random_member

LENGTH = 14


@pytest.fixture(scope="module")
def large():
    return random_member(1, hidden=48, layers=3)


@pytest.fixture(scope="module")
def small():
    return random_member(2)


@pytest.fixture(scope="module")
def expert():
    return random_member(3)


def tokens(results):
    return [result.token_ids for result in results]


def with_adapters(member, count):
    """A PeftModel with adapters expert0, ... that change something."""
    model = copy.deepcopy(member.model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = get_peft_model(model, config, adapter_name="expert0")
    for t in range(1, count):
        wrapped.add_adapter(f"expert{t}", config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return wrapped.eval()


def merged(wrapped, name):
    model = copy.deepcopy(wrapped)
    model.set_adapter(name)
    return Member(model.merge_and_unload().eval(), TOKENIZER)


def test_adapters_are_read_with_their_base_in_one_pass(large, small, tmp_path):
    """And give what models with the adapters merged into them give."""
    wrapped = with_adapters(small, 2)
    experts = [merged(wrapped, f"expert{t}") for t in range(2)]
    want = logit_fusion(FusedModel(large, small, experts), PROMPTS, max_new_tokens=LENGTH)
    large.model.save_pretrained(tmp_path / "large")
    small.model.save_pretrained(tmp_path / "small")
    for name in ("large", "small"):
        TOKENIZER.save_pretrained(tmp_path / name)
    wrapped.save_pretrained(tmp_path / "lora")
    folders = [str(tmp_path / "lora" / f"expert{t}") for t in range(2)]
    fused = open_fusion(str(tmp_path / "large"), str(tmp_path / "small"), folders, max_batch_size=2)
    assert fused.members[1].model is fused.members[2].model is fused.members[3].model
    calls = []
    inner = fused.members[1].model.get_base_model()
    inner.register_forward_hook(lambda *_: calls.append(1))
    got = logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH)
    assert tokens(got) == tokens(want)
    assert [r.trace for r in got] == [r.trace for r in want]
    assert len(calls) == 3 * LENGTH  # five prompts, two at a time
    with pytest.raises(DecodeError, match="can take tokens back"):
        logit_fusion(fused, ["abc"], speculate=2)
    with pytest.raises(DecodeError, match=r"experts\[0\], the adapter in .* does not fit"):
        open_fusion(str(tmp_path / "small"), str(tmp_path / "large"), folders)


def test_padded_vocabularies_are_cropped(large, small, expert):
    """To what all models know; what only the padding says is never written."""
    wide = random_member(1, hidden=48, layers=3, vocab=512)
    with torch.no_grad():
        weight = wide.model.get_input_embeddings().weight
        weight[:262] = large.model.get_input_embeddings().weight
        weight[262:] *= 20
        names = dict(large.model.named_parameters())
        for name, parameter in wide.model.named_parameters():
            if "embed" not in name:
                parameter.copy_(names[name])
    assert any(int(t) >= 262 for t in greedy(wide, "abc", 6))
    want = logit_fusion(FusedModel(large, small, [expert]), PROMPTS, max_new_tokens=LENGTH)
    got = logit_fusion(FusedModel(wide, small, [expert]), PROMPTS, max_new_tokens=LENGTH)
    assert tokens(got) == tokens(want)


def test_each_model_reads_by_its_own_template(large, small, expert):
    chatty = build_tokenizer(64)
    chatty.chat_template = "<think>{{ messages[0]['content'] }}</think>"
    fused = FusedModel(large, Member(small.model, chatty), [Member(expert.model, chatty)])
    first, second, _ = fused.prompts("ab", 0)
    assert TOKENIZER.decode(first.ids) == "ab"
    assert TOKENIZER.decode(second.ids) == "<think>ab</think>"
    [result] = logit_fusion(fused, ["ab"], max_new_tokens=6)
    assert result.num_prefill_tokens == 2 + 4 + 4
    given = [0, *TOKENIZER("ab")["input_ids"]]
    assert [prompt.ids for prompt in fused.prompts(given, 0)] == [tuple(given)] * 3


def test_the_end_of_any_model_ends_the_answer(large, small, expert):
    """An expert that was tuned to end otherwise than the large model."""
    [whole] = logit_fusion(FusedModel(large, small, [expert]), ["abc"], max_new_tokens=LENGTH)
    other = build_tokenizer(64)
    other.eos_token = other.convert_ids_to_tokens(whole.token_ids[3])
    fused = FusedModel(large, small, [Member(expert.model, other)])
    [result] = logit_fusion(fused, ["abc"], max_new_tokens=LENGTH)
    end = whole.token_ids.index(whole.token_ids[3])
    assert result.token_ids == whole.token_ids[: end + 1]
    assert (result.finish, result.stop_reason) == ("stop", "stop")


def test_tokenizers_that_disagree_are_refused(large, small, expert):
    other = build_tokenizer(64)
    other.add_tokens(["<tool>"])
    with pytest.raises(DecodeError, match=r"'<tool>' is None for large and 262 for experts\[0\]"):
        FusedModel(large, small, [Member(expert.model, other)])
    with pytest.raises(DecodeError, match="one of the models knows 200"):
        FusedModel(large, small, [random_member(5, vocab=200)])
