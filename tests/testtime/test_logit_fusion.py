"""Logit fusion against its definition, and what it must be at the ends of its range."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch

from rlalign.config.testtime import FusionConfig
from rlalign.rollout import hf
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.fusion_models import FusedModel
from rlalign.testtime.logit_fusion import grid, logit_fusion
from tests.testtime.fusion_cases import (
    PROMPTS,
    TOKENIZER,
    by_definition,
    fused_probability,
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


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("ahead", [0, 1])
def test_what_is_drawn_is_distributed_as_the_fusion_says(large, small, expert, ahead, top_p):
    """The first token and the one after it, which is drafted with `ahead`, against all pairs'
    exact probabilities: chi-square over pairs with ten expected draws or more, and all others."""
    num, coarse = 4000, [0.0, 0.5, 1.0, 1.5, 2.0]
    fused = FusedModel(large, small, [expert], max_batch_size=num)
    results = logit_fusion(
        fused, [{"prompt": "abc", "id": str(i)} for i in range(num)], max_new_tokens=3,
        temperature=1.0, alpha_step=0.5, top_p=top_p, speculate=ahead,
    )  # fmt: skip
    if ahead:
        drafted, kept = (sum(r.counters[x] for r in results) for x in ("drafted", "kept"))
        assert 0.1 * drafted < kept < 0.9 * drafted

    def after(*more):
        ids = [*TOKENIZER("abc")["input_ids"], *more]
        return fused_probability(large, small, expert, ids, coarse, top_p=top_p).tolist()

    expected = {}
    for first, p in enumerate(after()):
        if num * p >= 10 and first != TOKENIZER.eos_token_id:
            expected |= {(first, second): num * p * q for second, q in enumerate(after(first))}
    found = collections.Counter(result.token_ids[:2] for result in results)
    if top_p < 1:
        heads = {first for first, _ in expected}
        assert all(expected[pair] > 0 for pair in found if pair[0] in heads)
    often = [pair for pair, count in expected.items() if count >= 10]
    pairs = [(found[pair], expected[pair]) for pair in often]
    rest = tuple(num - sum(x) for x in zip(*pairs, strict=True))
    chi_square = sum((n - e) ** 2 / e for n, e in [*pairs, rest])
    assert len(pairs) > 20
    assert chi_square < len(pairs) + 4 * (2 * len(pairs)) ** 0.5


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
    plain, fine = (grid(FusionConfig(alpha_refine=refine)) for refine in (False, True))
    assert plain == [round(i / 10, 10) for i in range(21)]
    assert fine == [round(i / 100, 10) for i in range(201)]
    assert grid(FusionConfig(alpha_min=1.0, alpha_max=1.0)) == [1.0]


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
