"""LatentSeek: where it moves, what it remembers, what it returns."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.rollout.search import (
    Ascend,
    Draw,
    Latents,
)
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.latent_seek import latent_seek
from rlalign.testtime.prompt import make_prompt, plain_text
from rlalign.testtime.run import greedy
from tests.testtime.seeking import (
    BOLD,
    PROMPTS,
    Ending,
    Recorder,
    Scored,
    bad,
    greedy_ids,
    hashed,
    open_random,
    same,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> HFSearch:
    return open_random(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("options", "reason"), [({"max_steps": 0}, "max_steps"), ({"tau": -1.5}, "accepted")]
)
def test_without_steps_it_is_greedy_decoding(engine, options, reason):
    recorder, reward = Recorder(engine), Scored(bad)
    results = latent_seek(recorder, PROMPTS, reward, **BOLD | options)
    for text, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == greedy_ids(engine, text)
        assert (result.stop_reason, result.num_reward_calls) == (reason, 1)
        assert result.num_generated_tokens == len(result.token_ids)
        assert result.counters["steps"] == 0 and result.trace["num_latents"] == 0
    assert not recorder.of(Latents) and not recorder.of(Ascend)


def test_the_threshold_itself_is_refused(engine):
    [at] = latent_seek(engine, ["zzzz"], Scored(lambda text: -0.25), **BOLD | {"tau": -0.25})
    [above] = latent_seek(engine, ["zzzz"], Scored(lambda text: -0.25), **BOLD | {"tau": -0.26})
    assert at.counters["steps"] == 6 and above.stop_reason == "accepted"


@pytest.mark.parametrize(("rho", "start", "cap"), [(0.5, 0, 300), (0.29, 3, 300), (1.0, 15, 4)])
def test_latents_are_those_that_the_greedy_tokens_come_from(engine, rho, start, cap):
    options = BOLD | {"rho": rho, "start_index": start, "max_latent_len": cap}
    weight_VD = engine.model.get_output_embeddings().weight
    lengths = set()
    for text in PROMPTS:
        recorder = Recorder(engine)
        [result] = latent_seek(recorder, [text], Scored(bad), **options)
        ids = greedy_ids(engine, text)
        num = max(0, min(math.floor(rho * len(ids)), cap, len(ids) - start))
        assert result.trace["num_latents"] == num
        assert (result.stop_reason == "no_latents") == (num == 0)
        for request, latent_ND in recorder.of(Latents):
            assert request.ids[request.start : request.stop] == ids[start : start + num]
            found = (latent_ND @ weight_VD.T).argmax(1)
            assert tuple(found.tolist()) == ids[start : start + num]
            assert result.counters["tie_mismatches"] == 0
        lengths.add(num)
    assert len(lengths) == 2  # the short answer's is another


@pytest.mark.parametrize("start", [0, 3])
def test_an_answer_begins_with_what_the_latents_say_and_goes_on_greedily(engine, start):
    recorder = Recorder(engine)
    options = BOLD | {"start_index": start, "select": "last"}
    [result] = latent_seek(recorder, ["12+3=?"], Scored(hashed), **options)
    first, prompt = greedy_ids(engine, "12+3=?"), make_prompt(engine.tokenizer, "12+3=?")
    states = [reply.state.latent_ND for _, reply in recorder.of(Ascend)]
    weight_VD = engine.model.get_output_embeddings().weight
    prefix = first[:start] + tuple((states[-1] @ weight_VD.T).argmax(1).tolist())
    assert result.token_ids[: len(prefix)] == prefix
    rest = Draw(prompt.ids + prefix, greedy(20 - len(prefix)))
    assert result.token_ids == prefix + engine.answer([rest])[0].ids
    assert result.trace["steps"][-1]["prefix"] == [engine.tokenizer.decode([t]) for t in prefix]
    assert len(states) == 6


def test_each_gradient_has_the_reward_of_the_tokens_it_is_of(engine):
    recorder = Recorder(engine)
    [result] = latent_seek(recorder, ["hello"], Scored(hashed), **BOLD)
    prompt, texts = make_prompt(engine.tokenizer, "hello"), {}
    for request, drawn in recorder.of(Draw):
        ids = request.ids[len(prompt.ids) :] + drawn.ids
        texts[ids[: result.trace["num_latents"]]] = plain_text(engine.tokenizer, ids)
    for request, _ in recorder.of(Ascend):
        assert request.reward == hashed(texts[tuple(request.tokens_N.tolist())])


@pytest.mark.parametrize("lr", [0.002, 0.1, 0.5])
@pytest.mark.parametrize("tokens", ["argmax", "categorical"])
def test_memory_saves_work_and_changes_nothing(engine, lr, tokens):
    options = BOLD | {"lr": lr, "tokens": tokens, "max_steps": 12}
    rewards = Scored(hashed), Scored(hashed)
    with_it = latent_seek(engine, PROMPTS, rewards[0], **options)
    without = latent_seek(engine, PROMPTS, rewards[1], memo=False, **options)
    for a, b in zip(with_it, without, strict=True):
        assert (a.trace, a.text, a.reward) == (b.trace, b.text, b.reward)
        assert b.num_reward_calls == 13
        assert a.num_reward_calls <= 13 - a.counters["repeats"]
    assert len(set(rewards[0].texts)) == len(set(rewards[1].texts))
    if lr == 0.002 and tokens == "argmax":  # most steps change no token
        assert len(rewards[0].texts) < len(rewards[1].texts) / 2


def test_a_step_that_changes_nothing_asks_for_nothing_else(engine):
    recorder = Recorder(engine)
    latent_seek(recorder, ["zzzz"], Scored(bad), **BOLD | {"lr": 1e-6})
    assert [type(request) for request, _ in recorder.log] == [Draw, Latents] + 6 * [Ascend]


def test_prefixes_met_again_are_not_asked_again(engine):
    """Random signs go back and forth."""
    recorder, reward = Recorder(engine), Scored(bad)
    options = BOLD | {"proposal": "random_signs", "max_steps": 40, "rho": 0.1, "lr": 1.0}
    [result] = latent_seek(recorder, ["7"], reward, **options)
    asked = [request.ids for request, _ in recorder.of(Draw)]
    assert len(set(asked)) == len(asked) == len(reward.texts) == result.num_reward_calls
    assert len(asked) < len(result.trace["steps"])


def test_searches_that_step_on_the_spot_draw_with_the_others(engine):
    """Steps come first, so that a round of draws is one for all."""
    rounds = []

    class Counting(Recorder):
        def answer(self, requests):
            rounds.append({type(request) for request in requests})
            return super().answer(requests)

    recorder = Counting(engine)
    options = BOLD | {"lr": 0.003, "max_steps": 20}
    results = latent_seek(recorder, PROMPTS[1:], Scored(bad), **options)
    assert sum(result.counters["repeats"] for result in results) > 30
    most = max(len({*map(tuple, (s["prefix"] for s in r.trace["steps"]))}) for r in results)
    assert sum(Draw in kinds for kinds in rounds) <= most + 1
    assert all(kinds == {Ascend} for kinds in rounds if Ascend in kinds)


@pytest.mark.parametrize("in_flight", [2, 6])
@pytest.mark.parametrize("how", [{}, {"tokens": "categorical"}, {"proposal": "random_signs"}])
def test_searches_side_by_side_are_those_alone_in_any_order(engine, in_flight, how):
    rows = [{"prompt": text, "id": text} for text in PROMPTS]
    alone = {row["id"]: latent_seek(engine, [row], Scored(hashed), **BOLD | how)[0] for row in rows}
    order = rows if in_flight == 2 else rows[::-1]
    results = latent_seek(engine, order, Scored(hashed), in_flight=in_flight, **BOLD | how)
    assert all(same(result, alone[row["id"]]) for row, result in zip(order, results, strict=True))


def test_the_controls_draw_by_seed_and_prompt(engine):
    for how in ({"tokens": "categorical"}, {"proposal": "random_signs"}):
        options = BOLD | how
        paths = [
            latent_seek(engine, ["7"], Scored(bad), seed=seed, **options)[0].trace
            for seed in (0, 1)
        ]
        assert paths[0] != paths[1]
        rows = [{"prompt": "7", "id": name} for name in "aba"]
        other = [r.trace for r in latent_seek(engine, rows, Scored(bad), **options)]
        assert other[0] == other[2] != other[1]
    plain = [
        latent_seek(engine, PROMPTS, Scored(bad), seed=seed, **BOLD)[0].trace for seed in (0, 1)
    ]
    assert plain[0] == plain[1]


def test_random_signs_leave_the_reward_out_of_the_direction(engine):
    options = BOLD | {"proposal": "random_signs"}
    results = [latent_seek(engine, ["7"], Scored(f), **options)[0] for f in (bad, lambda t: -0.3)]
    paths = [[step["prefix"] for step in result.trace["steps"]] for result in results]
    assert paths[0] == paths[1] and len(paths[0]) > 2


def test_the_best_answer_is_never_worse_than_the_greedy_one_and_the_last_is_the_last(engine):
    best = latent_seek(engine, PROMPTS, Scored(hashed), **BOLD)
    last = latent_seek(engine, PROMPTS, Scored(hashed), select="last", **BOLD)
    for a, b in zip(best, last, strict=True):
        steps = a.trace["steps"]
        assert steps == b.trace["steps"] and len(steps) > 1
        rewards = [step["reward"] for step in steps]
        assert a.reward == max(rewards) >= rewards[0]
        assert a.text == steps[rewards.index(max(rewards))]["text"]
        assert (b.reward, b.text) == (rewards[-1], steps[-1]["text"])
    assert any(a.text != b.text for a, b in zip(best, last, strict=True))


def test_it_stops_at_the_first_answer_above_the_threshold(engine):
    [path] = latent_seek(engine, ["zzzz"], Scored(bad), **BOLD)
    wanted = path.trace["steps"][2]["text"]
    [found] = latent_seek(engine, ["zzzz"], Scored(lambda text: -float(text != wanted)), **BOLD)
    assert (found.stop_reason, found.text, found.reward) == ("accepted", wanted, 0.0)
    assert found.trace["steps"] == [*path.trace["steps"][:2], found.trace["steps"][-1]]


def test_the_trace_says_what_changed():
    engine = Ending(["...", "a..", "a..", "a..", "ab<eos>", "a<eos>b", "a<eos>c"])
    options = {"rho": 0.5, "max_new_tokens": 6, "max_steps": 7}
    [result] = latent_seek(engine, ["x"], Scored(hashed), **options)
    found = [
        (step["step"], step["text"], "".join(step["prefix"]), step["changed"], step.get("repeats"))
        for step in result.trace["steps"]
    ]
    assert found == [
        (0, "......", "...", [], None),
        (2, "a.....", "a..", [0], 1),
        (5, "ab", "ab<eos>", [1, 2], 2),
        (6, "a", "a<eos>", [1, 2], None),
    ]
    assert [step["reward"] for step in result.trace["steps"]] == [
        hashed(text) for _, text, *_ in found
    ]
    assert (result.counters["steps"], result.counters["repeats"]) == (7, 4)
    assert result.trace["num_latents"] == 3 and result.trace["method"] == "latent_seek"


def test_numerical_ties_are_counted_and_the_greedy_tokens_rewarded():
    engine = Ending(["a..", "b.."], off=2)
    options = {"rho": 0.5, "max_new_tokens": 6, "max_steps": 2}
    [result] = latent_seek(engine, ["x"], Scored(bad), **options)
    assert result.counters["tie_mismatches"] == 2
    rewarded = [r.tokens_N.tolist() for r in engine.requests if isinstance(r, Ascend)]
    assert rewarded == [engine.tokenizer(text)["input_ids"] for text in ("...", "a..")]


@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_an_end_token_in_the_beginning_ends_the_answer(compat):
    engine = Ending(["a<eos>b", "a<eos>a"])
    options = {"rho": 0.5, "max_new_tokens": 6, "max_steps": 2, "compat": compat, "select": "last"}
    [result] = latent_seek(engine, ["x"], Scored(bad), **options)
    draws = [r for r in engine.requests if isinstance(r, Draw)]
    if compat == "fixed":
        assert (result.text, result.finish) == ("a", "stop")
        assert list(result.token_ids) == engine.tokenizer("a<eos>")["input_ids"]
        assert len(draws) == 1 and result.counters["repeats"] == 1
        assert result.trace["steps"][1]["changed"] == [0, 1, 2]
    else:
        assert (result.text, result.finish) == ("aa...", "length") and len(draws) == 3


def test_the_official_way_returns_the_last_and_keeps_latents_in_bfloat16(engine):
    recorder = Recorder(engine)
    results = latent_seek(recorder, PROMPTS, Scored(hashed), compat="official", **BOLD)
    for result in results:
        assert result.text == result.trace["steps"][-1]["text"]
    for request, reply in recorder.of(Ascend):
        assert request.state.latent_ND.dtype == reply.state.second_ND.dtype == torch.bfloat16
