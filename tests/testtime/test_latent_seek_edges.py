"""LatentSeek at its limits: short answers, rewards that are none, budgets, and who is asked."""

from __future__ import annotations

import math

import pytest

from rlalign.config.load import ConfigError, parse
from rlalign.config.testtime import LatentSeekConfig
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Ascend, Choose, Draw, Latents, run_searches
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.latent_seek import latent_seek, search
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt, make_prompt
from rlalign.testtime.result import Result
from rlalign.testtime.rewards import FunctionReward
from rlalign.testtime.solver_templates import TEMPLATES
from rlalign.testtime.verifier_roles import PHRASE
from tests.testtime.scripted import ScriptedEngine
from tests.testtime.seeking import (
    BOLD,
    PROMPTS,
    Ending,
    Recorder,
    Scored,
    bad,
    hashed,
    open_random,
    same,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> HFSearch:
    return open_random(tmp_path_factory.mktemp("model"))


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
    assert result.reward is None and result.counters["bad_rewards"] == result.num_reward_calls
    assert {step["reward"] for step in result.trace["steps"]} == {None}
    [plain] = latent_seek(engine, ["zzzz"], Scored(bad), **BOLD)
    for step, other in zip(result.trace["steps"], plain.trace["steps"], strict=True):
        assert step == other | {"reward": None}


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
    assert result.counters["positive_rewards"] == 0


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


class Costly(Scored):
    """A reward that has the model write 30 tokens."""

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger):
        params = SamplingParams(30, temperature=0.0, ignore_eos=True)
        yield from ledger.ask([Draw(prompt.ids, params)])
        return (yield from super().__call__(prompt, response, ledger))


@pytest.mark.parametrize(("budget", "steps"), [(50, 0), (51, 1), (90, 1), (91, 2)])
def test_what_a_reward_writes_is_within_the_budget_of_tokens(engine, budget, steps):
    """20 tokens and 30 of the reward, then 10 and 30 for each step; looked at before each."""
    recorder = Recorder(engine)
    [result] = latent_seek(recorder, ["zzzz"], Costly(hashed), max_tokens=budget, **BOLD)
    assert (result.stop_reason, result.counters["steps"]) == ("max_tokens", steps)
    assert len(recorder.of(Latents)) == min(steps, 1) and len(recorder.of(Ascend)) == steps
    assert result.reward is not None


def test_rounding_loses_no_latent():
    engine = Ending(["." * 29])
    options = {"rho": 0.29, "max_new_tokens": 100, "max_steps": 1}
    [result] = latent_seek(engine, ["x"], Scored(bad), **options)
    assert 0.29 * 100 < 29 == result.trace["num_latents"]


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
    engine = open_random(tmp_path, hidden=16, layers=1, max_positions=2048)
    recorder = Recorder(engine)
    options = BOLD | {"verifier": {"judge": "logprob"}}
    results = latent_seek(recorder, ["12+3=?", "7"], **options)
    for result in results:
        assert not result.error and -1 <= result.reward <= 0
        assert set(result.trace["steps"][0]["roles"].values()) <= {True, False}
    sixths = [6 * step["reward"] for r in results for step in r.trace["steps"]]
    assert all(abs(value - round(value)) < 1e-9 for value in sixths)
    assert recorder.of(Choose)


def test_a_self_reward_that_cannot_be_is_refused_at_once():
    with pytest.raises(DecodeError, match="role_weights"):
        latent_seek(ScriptedEngine(), ["What?"], verifier={"role_weights": [1.0]})


def test_an_oracle_is_marked(engine):
    def knows(prompts, completions, answer, **_):
        return [-float(a not in c) for a, c in zip(answer, completions, strict=True)]

    row = {"prompt": "zzzz", "answer": "no such thing"}

    def bare(prompts, completions, **columns):
        return knows(prompts, completions, columns["answer"])

    with FunctionReward(knows) as reward, FunctionReward(bare) as other:
        [marked] = latent_seek(engine, [row], reward, **BOLD)
        [told] = latent_seek(engine, [row], other, oracle=True, **BOLD)
        [plain] = latent_seek(engine, [row], other, **BOLD)
    assert marked.counters["oracle"] == told.counters["oracle"] == 1
    assert "oracle" not in plain.counters
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


def test_a_search_can_be_driven_by_hand(engine):
    prompt = make_prompt(engine.tokenizer, "zzzz")
    cfg = parse(LatentSeekConfig, BOLD)
    [result] = run_searches(engine, [search(engine, prompt, Scored(hashed), cfg)])
    [same_result] = latent_seek(engine, ["zzzz"], Scored(hashed), **BOLD)
    assert isinstance(result, Result) and same(result, same_result)


def test_a_verdict_that_changes_counts_without_a_memory_and_a_failed_one_is_asked_again(engine):
    """With one, a beginning has one verdict, unless it failed."""

    def turning(first):
        said = iter([first])
        return Scored(lambda text: next(said, 0.0))

    still = BOLD | {"lr": 1e-6}  # no token changes
    [kept] = latent_seek(engine, ["zzzz"], turning(-1.0), **still)
    assert kept.stop_reason == "max_steps" and kept.num_reward_calls == 1
    [anew] = latent_seek(engine, ["zzzz"], turning(-1.0), memo=False, **still)
    assert (anew.stop_reason, anew.reward, anew.num_reward_calls) == ("accepted", 0.0, 2)
    [failed] = latent_seek(engine, ["zzzz"], turning(math.nan), **still)
    assert (failed.stop_reason, failed.reward, failed.num_reward_calls) == ("accepted", 0.0, 2)
