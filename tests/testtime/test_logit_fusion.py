"""Logit fusion against its definition, and what it must be at the ends of its range."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout import hf
from rlalign.testtime import logit_fusion as module
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.fusion_models import FusedModel, Member, open_fusion
from rlalign.testtime.logit_fusion import logit_fusion
from tests.testtime.fusion_cases import (
    PROMPTS,
    TOKENIZER,
    by_definition,
    greedy,
    random_member,
    strides,
    trained,
)

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


@pytest.fixture(params=["fast", "generic"])
def path(request, monkeypatch):
    """Both ways of decoding."""
    if request.param == "generic":
        monkeypatch.setattr(hf, "is_plain_decoder", lambda model, longest: False)


def tokens(results):
    return [result.token_ids for result in results]


def test_the_method_is_its_definition(large, small, expert, path):
    """Tokens and strengths; prompts of several lengths, rows that end early."""
    fused = FusedModel(large, small, [expert], max_batch_size=3)
    results = logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids, alphas = by_definition(large, small, expert, prompt, LENGTH)
        assert result.token_ids == ids
        assert result.trace["alphas"] == alphas
        assert result.trace["experts"] == [0 if alpha else -1 for alpha in alphas]
    assert len({alpha for r in results for alpha in r.trace["alphas"]}) > 3


def test_strength_0_is_the_large_model_and_1_is_proxy_tuning(large, small, expert):
    fused = FusedModel(large, small, [expert])
    alone = logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH, alpha_max=0.0)
    assert tokens(alone) == [greedy(large, prompt, LENGTH) for prompt in PROMPTS]
    for fixed in (0.5, 1.0, 1.5):
        got = logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH, alpha_min=fixed, alpha_max=fixed)
        want = [by_definition(large, small, expert, p, LENGTH, [fixed])[0] for p in PROMPTS]
        assert tokens(got) == want


def test_an_expert_that_is_the_base_leaves_the_large_model(large, small):
    results = logit_fusion(FusedModel(large, small, [small]), PROMPTS, max_new_tokens=LENGTH)
    assert tokens(results) == [greedy(large, prompt, LENGTH) for prompt in PROMPTS]
    assert not any(alpha for r in results for alpha in r.trace["alphas"])
    assert {t for r in results for t in r.trace["experts"]} == {-1}


def test_a_large_model_that_is_the_base_writes_as_the_expert(small, expert):
    results = logit_fusion(FusedModel(small, small, [expert]), PROMPTS, max_new_tokens=LENGTH)
    assert tokens(results) == [greedy(expert, prompt, LENGTH) for prompt in PROMPTS]
    assert {alpha for r in results for alpha in r.trace["alphas"]} == {1.0}


def test_without_experts_the_large_model_writes(large, small):
    results = logit_fusion(FusedModel(large, small, []), PROMPTS, max_new_tokens=LENGTH)
    assert tokens(results) == [greedy(large, prompt, LENGTH) for prompt in PROMPTS]
    assert results[0].num_engine_calls == len(results[0].token_ids)


def test_another_order_of_experts_names_them_otherwise(large, small, expert):
    other = random_member(4)
    results = [
        logit_fusion(FusedModel(large, small, pair), PROMPTS, max_new_tokens=LENGTH)
        for pair in ([expert, other], [other, expert])
    ]
    assert tokens(results[0]) == tokens(results[1])
    acting = [[t for r in group for t in r.trace["experts"]] for group in results]
    assert {0, 1} <= set(acting[0])
    assert acting[1] == [1 - t if t >= 0 else t for t in acting[0]]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_speculation_writes_the_same(large, ahead, path):
    """Models near each other, so that drafts stand and fall."""
    near = [random_member(1, hidden=48, layers=3) for _ in range(2)]
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in itertools.chain(*(member.model.parameters() for member in near)):
            parameter += 0.03 * torch.randn(parameter.shape, generator=rng)
    fused = FusedModel(large, near[0], [near[1], random_member(4)], max_batch_size=3)
    plain = logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH)
    ahead_of = logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH, speculate=ahead)
    assert tokens(ahead_of) == tokens(plain)
    assert [r.trace for r in ahead_of] == [r.trace for r in plain]
    drafted, kept = (sum(r.counters[x] for r in ahead_of) for x in ("drafted", "kept"))
    assert 0 < kept < drafted


def test_speculation_up_to_the_end_of_the_context(large, small, expert):
    """Beside a row that has all the room in the world."""
    fused = FusedModel(large, small, [expert])
    prompts = [[7] * 55, "abc"]
    plain, ahead = (logit_fusion(fused, prompts, speculate=n, max_new_tokens=40) for n in (0, 5))
    assert tokens(plain) == tokens(ahead)
    assert len(plain[0].token_ids) == 9 and len(plain[1].token_ids) > 14


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


@pytest.mark.parametrize("options", [{}, {"speculate": 3}, {"temperature": 0.9, "top_p": 0.8}])
def test_prompts_beside_it_change_nothing(large, small, expert, options):
    results = [
        logit_fusion(
            FusedModel(large, small, [expert], max_batch_size=size),
            [{"prompt": p, "id": p} for p in prompts], max_new_tokens=LENGTH, **options,
        )
        for size, prompts in ((1, PROMPTS), (2, PROMPTS), (64, PROMPTS), (64, PROMPTS[::-1]))
    ]  # fmt: skip
    results[-1].reverse()
    for other in results[1:]:
        assert tokens(other) == tokens(results[0])
        assert [r.trace for r in other] == [r.trace for r in results[0]]


def test_seeds_key_what_is_drawn(large, small, expert):
    fused = FusedModel(large, small, [expert])
    drawn = [
        tokens(logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH, temperature=1.0, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_account_counts_every_model(large, small, expert):
    fused = FusedModel(large, small, [expert])
    [result] = logit_fusion(fused, ["abc"], max_new_tokens=5)
    assert result.num_prefill_tokens == 3 * 3
    assert result.num_generated_tokens == len(result.token_ids) == 5
    assert result.num_engine_calls == 3 * 5
    assert (result.finish, result.stop_reason) == ("length", "length")
    [ahead] = logit_fusion(fused, ["abc"], max_new_tokens=5, speculate=1)
    rounds = ahead.counters["drafted"]
    assert ahead.num_generated_tokens == 5
    assert ahead.num_engine_calls == 3 + 4 * rounds + 3 * (4 - rounds - ahead.counters["kept"])


def test_budgets_end_an_answer_with_what_there_is(large, small, expert, monkeypatch):
    fused = FusedModel(large, small, [expert])
    [whole] = logit_fusion(fused, ["abc"], max_new_tokens=LENGTH)
    for options in ({}, {"speculate": 4}):
        [part] = logit_fusion(fused, ["abc"], max_new_tokens=LENGTH, max_tokens=4, **options)
        assert part.token_ids == whole.token_ids[:4]
        assert (part.finish, part.stop_reason, part.over_budget) == ("length", "max_tokens", True)
    clock = itertools.count()
    monkeypatch.setattr("rlalign.testtime.ledger.time.monotonic", lambda: next(clock))
    [part] = logit_fusion(fused, ["abc"], max_new_tokens=LENGTH, max_wall_s=4.5)
    assert part.stop_reason == "max_wall_s" and 0 < len(part.token_ids) < LENGTH
    assert part.token_ids == whole.token_ids[: len(part.token_ids)]


def test_logits_that_are_not_numbers_fail_their_row_alone(large, small, path):
    """A model that breaks at one token; the row in its place afterwards is served."""
    broken = random_member(3, vocab=300)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[200] = torch.nan
        broken.model.lm_head.weight = torch.nn.Parameter(broken.model.lm_head.weight.clone())
        broken.model.lm_head.weight[200] = 0
    prompts = ["abc", [5, 200, 7], "xyz", "q"]
    fused = FusedModel(large, small, [broken], max_batch_size=2)
    results = logit_fusion(fused, prompts, max_new_tokens=6)
    assert [bool(r.error) for r in results] == [False, True, False, False]
    assert "experts[0] are not finite" in results[1].error
    for i in (0, 2, 3):
        [alone] = logit_fusion(fused, [prompts[i]], max_new_tokens=6)
        assert alone.token_ids == results[i].token_ids


def test_a_bad_prompt_does_not_stop_the_rest(large, small, expert):
    fused = FusedModel(large, small, [expert])
    done = []
    results = logit_fusion(
        fused, ["abc", [], [5] * 64, [900], {"text": "no prompt"}],
        max_new_tokens=4, on_done=lambda i, result: done.append((i, result)),
    )  # fmt: skip
    assert [bool(r.error) for r in results] == [False, True, True, True, True]
    assert sorted(i for i, _ in done) == [0, 1, 2, 3, 4]
    assert all(results[i] is result for i, result in done)
    assert "no token can follow" in results[2].error and "900" in results[3].error


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


def test_options_that_do_not_go_together(large, small, expert):
    one = FusedModel(large, small, [expert])
    for fused, options, message in (
        (one, {"alpha_min": 1.0, "alpha_max": 0.5}, "no strength is left"),
        (one, {"joint": True}, "joint=true is for two experts"),
        (FusedModel(large, small, []), {"speculate": 2}, "speculate needs an expert"),
    ):
        with pytest.raises(DecodeError, match=message):
            logit_fusion(fused, ["abc"], **options)
    window = random_member(6, architecture="mistral", sliding_window=8)
    with pytest.raises(DecodeError, match="can take tokens back"):
        logit_fusion(FusedModel(window, small, [expert]), ["abc"], speculate=2)


def test_a_refined_grid_has_ten_times_the_strengths():
    plain, fine = (
        module.grid(module.FusionConfig(alpha_refine=refine)) for refine in (False, True)
    )
    assert plain == [round(i / 10, 10) for i in range(21)]
    assert fine == [round(i / 100, 10) for i in range(201)]
    assert module.grid(module.FusionConfig(alpha_min=1.0, alpha_max=1.0)) == [1.0]


@pytest.mark.slow
def test_a_skill_is_carried_over_to_a_larger_model():
    """Three seeds: above the large base by far, and about where proxy-tuning is: a standard error
    of the difference is a hundredth."""
    gained, beyond = [], []
    for seed in range(3):
        small, expert = (trained(seed, 48, expert=is_expert) for is_expert in (False, True))
        large = trained(100 + seed, 80, expert=False)
        rows = list(itertools.islice(strides(1)(seed + 999), 150))

        def accuracy(experts, rows=rows, large=large, small=small, **options):
            fused = FusedModel(large, small, experts)
            results = logit_fusion(fused, [p for p, _ in rows], max_new_tokens=8, **options)
            pairs = zip(results, rows, strict=True)
            return sum(r.text == answer for r, (_, answer) in pairs) / len(rows)

        ours = accuracy([expert])
        gained.append(ours - accuracy([]))
        beyond.append(ours - accuracy([expert], alpha_min=1.0, alpha_max=1.0))
    assert min(gained) > 0.2
    assert sum(beyond) / 3 > -0.04
