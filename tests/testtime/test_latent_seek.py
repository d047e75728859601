"""LatentSeek: where it moves, what it remembers, what it returns, and that it finds answers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from rlalign.config.load import ConfigError, parse
from rlalign.config.schema import ModelConfig
from rlalign.config.testtime import LatentSeekConfig
from rlalign.models.load import load_causal_lm, load_tokenizer
from rlalign.models.random import init_model, small_config, write_random_model
from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout.search import (
    Ascend,
    Ascended,
    Choose,
    Draw,
    Drawn,
    Latents,
    Rate,
    run_searches,
)
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.latent_seek import latent_seek, search
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt, make_prompt, plain_text
from rlalign.testtime.result import Result
from rlalign.testtime.rewards import FunctionReward
from rlalign.testtime.run import greedy
from rlalign.testtime.solver_templates import TEMPLATES
from rlalign.testtime.verifier_roles import PHRASE, SelfVerification
from tests.testtime.scripted import ScriptedEngine

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = ["abc", "12+3=?", "hello", "7", "zzzz", "Q: why?"]  # the first is answered briefly
BOLD = {"lr": 0.5, "rho": 0.5, "max_new_tokens": 20, "max_steps": 6}  # moves on random models


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> HFSearch:
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, "qwen2", hidden=32, layers=2, max_positions=64)
    config = ModelConfig(path=str(folder), dtype="float32")
    return HFSearch(load_causal_lm(config, 0, "cpu"), load_tokenizer(config))


class Recorder:
    """An engine that remembers what it was asked and what it said."""

    def __init__(self, engine: HFSearch) -> None:
        self.inner, self.tokenizer = engine, engine.tokenizer
        self.eos_ids, self.limits = engine.eos_ids, engine.limits
        self.log: list[tuple[object, object]] = []

    def answer(self, requests):
        replies = self.inner.answer(requests)
        self.log += zip(requests, replies, strict=True)
        return replies

    def of(self, kind: type) -> list:
        return [(request, reply) for request, reply in self.log if isinstance(request, kind)]


class Scored:
    """A `Reward` of a function of the text, that counts its calls."""

    def __init__(self, score) -> None:
        self.score, self.texts = score, []

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger):
        [value] = yield from ledger.ask([Rate(self, prompt, response)])
        return value

    def rate(self, items):
        self.texts += [text for _, text in items]
        return [self.score(text) for _, text in items]


def hashed(text: str) -> float:
    """Some reward in [-1, -0.25], for texts of any kind."""
    return -1 + (sum(map(ord, text)) % 7) / 8


def bad(text: str) -> float:
    return -1.0


def same(a: Result, b: Result) -> bool:
    return dataclasses.replace(a, wall_s=0.0) == dataclasses.replace(b, wall_s=0.0)


def greedy_ids(engine: HFSearch, text: str, length: int = 20) -> tuple[int, ...]:
    prompt = make_prompt(engine.tokenizer, text)
    [drawn] = engine.answer([Draw(prompt.ids, greedy(length))])
    return drawn.ids


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
    weight_VD = engine._model.get_output_embeddings().weight
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
    weight_VD = engine._model.get_output_embeddings().weight
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


class Ending:
    """A script for a search: greedy dots, then latents whose tokens are `moves`, step by step;
    before the first step, `off` of them look as if they were another token."""

    def __init__(self, moves: list[str], off: int = 0) -> None:
        base = ScriptedEngine()
        self.tokenizer, self.eos_ids, self.limits = base.tokenizer, base.eos_ids, base.limits
        self.moves = [self.tokenizer(move)["input_ids"] for move in moves]
        self.off, self.requests = off, []

    def answer(self, requests):
        self.requests += requests
        return [self._reply(request) for request in requests]

    def _reply(self, request):
        if isinstance(request, Draw):
            num = request.params.max_completion_length
            [dot] = self.tokenizer(".")["input_ids"]
            return Drawn((dot,) * num, (0.0,) * num, "length")
        if isinstance(request, Latents):
            return torch.zeros(request.stop - request.start, 2)
        assert isinstance(request, Ascend)
        before_N = request.tokens_N.clone()
        before_N[: self.off] += 1
        return Ascended(request.state, torch.tensor(self.moves.pop(0)), before_N, False)


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


def test_a_short_answer_has_no_latents(engine):
    reward = Scored(bad)
    [one] = latent_seek(engine, ["zzzz"], reward, **BOLD | {"max_new_tokens": 1})
    assert (one.stop_reason, len(one.token_ids), reward.texts) == ("no_latents", 1, [one.text])
    [whole] = latent_seek(engine, ["zzzz"], reward, **BOLD | {"max_new_tokens": 1, "rho": 1.0})
    assert whole.counters["steps"] == 6 and whole.trace["num_latents"] == 1
    [late] = latent_seek(engine, ["zzzz"], reward, **BOLD | {"start_index": 20})
    assert late.stop_reason == "no_latents"


def test_a_whole_answer_may_be_latent(engine):
    for result in latent_seek(engine, PROMPTS, Scored(bad), **BOLD | {"rho": 1.0}):
        assert len(result.token_ids) <= 20 and result.counters["steps"] == 6
        assert result.finish == ("stop" if result.token_ids[-1] in engine.eos_ids else "length")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_the_worst_and_counted(engine, value):
    [result] = latent_seek(engine, ["zzzz"], Scored(lambda text: value), **BOLD)
    assert result.reward == -1.0 and result.counters["bad_rewards"] == result.num_reward_calls
    [plain] = latent_seek(engine, ["zzzz"], Scored(bad), **BOLD)
    assert result.trace == plain.trace


def test_rewards_that_cannot_move_anything_are_counted(engine):
    """A positive reward makes the tokens that have it likelier still."""
    recorder = Recorder(engine)
    [result] = latent_seek(recorder, ["zzzz"], Scored(lambda text: 0.5), **BOLD | {"tau": 0.9})
    assert result.counters["positive_rewards"] == 1 == len(result.trace["steps"])
    assert (result.stop_reason, result.counters["repeats"]) == ("max_steps", 6)


def test_a_gradient_of_zero_ends_the_search(engine):
    [result] = latent_seek(engine, ["zzzz"], Scored(lambda text: 0.0), **BOLD | {"tau": 0.5})
    assert (result.stop_reason, result.counters["steps"]) == ("still", 0)
    assert result.num_engine_calls == 3


def test_momentum_may_move_latents_whose_gradient_is_zero(engine):
    greedy_text = latent_seek(engine, ["zzzz"], Scored(bad), **BOLD | {"max_steps": 0})[0].text
    options = BOLD | {"tau": 0.5, "max_steps": 4}
    [result] = latent_seek(
        engine, ["zzzz"], Scored(lambda text: -float(text == greedy_text)), **options
    )
    assert (result.stop_reason, result.counters["steps"]) == ("max_steps", 4)
    [plain] = latent_seek(
        engine,
        ["zzzz"],
        Scored(lambda text: -float(text == greedy_text)),
        **options | {"optimizer": "sgd", "lr": 50.0},
    )
    assert (plain.stop_reason, plain.counters["steps"]) == ("still", 1)


def test_a_budget_of_tokens_gives_the_best_so_far(engine):
    [free] = latent_seek(engine, ["zzzz"], Scored(hashed), **BOLD)
    spent = []
    for budget in [1, 8, 19, 20, 21, *range(25, free.num_generated_tokens + 1, 5)]:
        [result] = latent_seek(engine, ["zzzz"], Scored(hashed), max_tokens=budget, **BOLD)
        assert result.num_generated_tokens <= budget
        rewards = [step["reward"] for step in result.trace["steps"]]
        if budget <= 20:  # cut off, or with nothing left: not judged
            assert rewards == [None] and result.reward is None and result.num_reward_calls == 0
            assert len(result.token_ids) == budget
        else:
            assert result.reward == max(rewards) and rewards == [
                step["reward"] for step in free.trace["steps"][: len(rewards)]
            ]
        assert result.over_budget and result.stop_reason == "max_tokens"
        spent.append(len(rewards))
    assert spent == sorted(spent) and spent[-1] > 2 and len(set(spent)) > 2


def test_a_budget_of_seconds_is_looked_at_between_rounds(engine, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("rlalign.testtime.ledger.time.monotonic", lambda: next(clock))
    [result] = latent_seek(engine, ["zzzz"], Scored(hashed), max_wall_s=6.0, **BOLD)
    assert result.over_budget and result.stop_reason == "max_wall_s"
    assert 1 <= len(result.trace["steps"]) < 6 and result.reward is not None


def test_self_verification_shares_rounds_and_enters_the_trace():
    """Roles approve of answers with a B in them; the search finds that out for itself."""
    engine = ScriptedEngine(lambda text, seed: f"{PHRASE} True" if "YOUR TASK" in text else "abc")
    [result] = latent_seek(engine, ["What?"])
    assert (result.text, result.reward, result.stop_reason) == ("abc", 0.0, "accepted")
    assert result.trace["steps"][0]["roles"] == dict.fromkeys(
        ["calculation_check", "answer_completeness", "answer_correct", "understanding_check"], True
    )
    assert [len(asked) for asked in engine.rounds] == [1, 4]
    assert result.num_reward_calls == 1 and result.num_engine_calls == 5
    assert result.num_generated_tokens == 4 + 4 * (len(f"{PHRASE} True") + 1)


def test_self_verification_works_on_a_model(tmp_path):
    write_random_model(tmp_path, "qwen2", hidden=16, heads=2, layers=1, max_positions=2048)
    config = ModelConfig(path=str(tmp_path), dtype="float32")
    engine = HFSearch(load_causal_lm(config, 0, "cpu"), load_tokenizer(config))
    recorder = Recorder(engine)
    reward = SelfVerification(recorder, parse(LatentSeekConfig, {}).verifier)
    assert reward is not None
    options = BOLD | {"verifier": {"judge": "logprob"}}
    results = latent_seek(recorder, ["12+3=?", "7"], **options)
    for result in results:
        assert not result.error and -1 <= result.reward <= 0
        assert set(result.trace["steps"][0]["roles"].values()) <= {True, False}
    sixths = [6 * step["reward"] for r in results for step in r.trace["steps"]]
    assert all(abs(value - round(value)) < 1e-9 for value in sixths)
    assert recorder.of(Choose)


def test_an_oracle_is_marked(engine):
    def knows(prompts, completions, answer, **_):
        return [-float(a not in c) for a, c in zip(answer, completions, strict=True)]

    row = {"prompt": "zzzz", "answer": "no such thing"}
    with FunctionReward(knows) as reward:
        [marked] = latent_seek(engine, [row], reward, oracle=True, **BOLD)
        [plain] = latent_seek(engine, [row], reward, **BOLD)
    assert marked.counters["oracle"] == 1 and "oracle" not in plain.counters
    assert marked.trace == plain.trace


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_put_the_question_their_way(name):
    engine = ScriptedEngine(lambda text, seed: "5")
    system, cue = TEMPLATES[name]
    [result] = latent_seek(
        engine, [{"prompt": "2+3?", "id": "q"}], Scored(lambda text: 0.0), template=name
    )
    assert engine.rounds[0] == [f"{system}\n2+3?{cue}"] and result.id == "q"
    engine.rounds.clear()
    latent_seek(engine, ["2+3?"], Scored(lambda text: 0.0))
    assert engine.rounds[0] == ["2+3?"]


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 1.2}, {"select": "first"}, {"lr": 0.0}])
def test_values_out_of_range_are_refused(engine, options):
    with pytest.raises(ConfigError, match="allowed"):
        latent_seek(engine, ["zzzz"], Scored(bad), **options)


def test_a_prompt_that_cannot_be_served_leaves_the_others(engine):
    results = latent_seek(engine, ["x" * 64, "abc", {"no": "prompt"}], Scored(bad), **BOLD)
    assert "no token can follow" in results[0].error and "has none of" in results[2].error
    assert not results[1].error and results[1].token_ids


PRESETS = sorted((ROOT / "configs" / "latent_seek").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_configs(path):
    cfg = parse(LatentSeekConfig, path)
    assert 0.05 <= cfg.rho <= 0.5 and cfg.max_steps == 10 and cfg.tau == -0.2
    if path.stem.count("_") == 2:
        assert cfg.select == "last" and path.stem.endswith(cfg.template)


def test_the_presets_are_those_of_the_papers_tables():
    """Tables 21 to 26 and the learning rates of the text, by hand."""

    def of(name: str) -> tuple[float, float]:
        cfg = parse(LatentSeekConfig, ROOT / f"configs/latent_seek/{name}.yaml")
        return cfg.rho, cfg.lr

    assert of("qwen2.5-1.5b_gsm8k_json") == (0.2, 10.0)
    assert of("qwen2.5-1.5b_gsm8k_boxed") == (0.05, 0.03)
    assert of("qwen2.5-7b_gsm8k_boxed") == (0.2, 0.05)
    assert of("qwen2.5-14b_math500_json") == (0.1, 0.05)
    assert of("llama-3.1-8b_aime24_json") == (0.2, 0.03)
    assert of("qwen2.5-1.5b_aime24_json") == (0.3, 10.0)
    assert of("qwen2-7b_math500_boxed") == (0.1, 0.03)
    assert len(PRESETS) == 5 * 3 * 2 + 2


def digit_model() -> HFSearch:
    """A small model that answers any letter with one of the digits 1 to 8, each as likely as the
    letter's last bits say, and a full stop."""
    tokenizer = build_tokenizer(32)
    config = small_config(
        "qwen2", vocab=len(tokenizer), hidden=32, layers=1, heads=2, kv_heads=1, mlp=64,
        max_positions=32, tied=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = init_model(config, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    eos = tokenizer.eos_token_id
    digits = [tokenizer(str(d))["input_ids"][0] for d in range(1, 9)]
    letters = [tokenizer(chr(97 + i))["input_ids"][0] for i in range(24)]
    for _ in range(150):
        letter_B = torch.randint(24, (64,), generator=generator)
        noise_B = torch.randint(8, (64,), generator=generator)
        sure_B = torch.rand(64, generator=generator) < 0.5
        digit_B = torch.where(sure_B, letter_B % 8, noise_B)
        ids_BT = torch.stack(
            [
                torch.tensor(letters)[letter_B],
                torch.tensor(digits)[digit_B],
                torch.full((64,), eos),
            ],
            1,
        )
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return HFSearch(model.eval(), tokenizer)


def test_it_finds_another_digit_than_the_model_would_say_and_more_often_than_noise():
    engine = digit_model()
    rows = [
        {"prompt": chr(97 + i), "id": f"{i}/{shift}", "answer": str((i + shift) % 8 + 1)}
        for i in range(24)
        for shift in range(1, 8)
    ]

    def oracle(prompts, completions, answer, **_):
        return [-float(a != c) for a, c in zip(answer, completions, strict=True)]

    options = {"rho": 0.5, "lr": 0.5, "max_steps": 40, "max_new_tokens": 4}
    with FunctionReward(oracle) as reward:
        start = latent_seek(engine, rows, reward, **options | {"max_steps": 0})
        found = latent_seek(engine, rows, reward, **options)
        noise = latent_seek(
            engine, rows, reward, **options | {"proposal": "random_signs", "max_steps": 1}
        )
    share = [sum(r.reward == 0 for r in results) / len(rows) for results in (start, found, noise)]
    assert share[0] == 0 and share[1] >= 0.9 and share[2] < share[1] - 0.3


def test_a_search_can_be_driven_by_hand(engine):
    prompt = make_prompt(engine.tokenizer, "zzzz")
    cfg = parse(LatentSeekConfig, BOLD)
    [result] = run_searches(engine, [search(engine, prompt, Scored(hashed), cfg)])
    [same_result] = latent_seek(engine, ["zzzz"], Scored(hashed), **BOLD)
    assert isinstance(result, Result) and same(result, same_result)
