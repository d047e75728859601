"""What holds for every method: prompts that fail alone, accounts that are kept, misuse that is
said."""

from __future__ import annotations

import math

import pytest

from rlalign.config.load import ConfigError
from rlalign.config.testtime import RainConfig, RolloutConfig
from rlalign.rewards.verdict import RewardError
from rlalign.rollout.engine import EngineError
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.majority import majority
from rlalign.testtime.prompt import make_prompt
from rlalign.testtime.rewards import FunctionReward
from rlalign.testtime.run import settings
from tests.testtime.search_fakes import LetterTokenizer, ScriptedEngine, in_turn


def same(text):
    return lambda prompt, seed, temperature: text


def knows(prompts, completions, answer):
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


@pytest.mark.parametrize("in_flight", [1, 64])
def test_a_row_without_the_rewards_column_fails_alone_whoever_is_beside_it(in_flight):
    rows = [{"prompt": "p", "answer": "ab"}, {"prompt": "q", "id": "bare"}]
    with FunctionReward(knows) as reward:
        good, bad = best_of_n(
            ScriptedEngine(same("ab")), rows, reward, num_samples=2, in_flight=in_flight
        )
    assert good.reward == 1.0 and not good.error
    assert bad.id == "bare" and "RewardError" in bad.error and "answer" in bad.error


def test_a_row_that_fails_keeps_its_account():
    class Failing(ScriptedEngine):
        def answer(self, requests):
            if len(self.rounds) == 2:
                return [EngineError("the card fell off")] * len(requests)
            return super().answer(requests)

    [result] = majority(Failing(same("abc")), ["question"], num_samples=5, max_tokens=100)
    assert "the card fell off" in result.error and result.finish == "error"
    assert result.num_generated_tokens == 8 and result.num_engine_calls == 2
    assert result.num_prefill_tokens == 16 and result.wall_s > 0


def test_what_is_no_list_of_prompts_is_refused():
    engine = ScriptedEngine(same("a"))
    for prompts in ("75-9-5=?", {"prompt": "q"}):
        with pytest.raises(DecodeError, match="list of prompts"):
            majority(engine, prompts)  # type: ignore[arg-type]
    with pytest.raises(DecodeError, match="in_flight=0"):
        majority(engine, ["q"], in_flight=0)


def test_a_bad_prompt_fails_alone_under_its_own_id():
    given = [{"id": "x", "prompt": [5, -1]}, {"id": "y", "text": "?"}, {"id": "z", "prompt": "q"}]
    results = majority(ScriptedEngine(same("a")), given, num_samples=1)
    assert [result.id for result in results] == ["x", "y", "z"]
    assert [bool(result.error) for result in results] == [True, True, False]
    assert "begin at 0" in results[0].error


def test_what_is_no_reward_is_refused_with_what_to_write():
    engine = ScriptedEngine(same("a"))
    for wrong, hint in ((None, "give one"), ("math", r"FunctionReward\('math'\)"), (knows, "wrap")):
        with pytest.raises(DecodeError, match=hint):
            best_of_n(engine, ["q"], wrong)  # type: ignore[arg-type]


def test_a_reward_of_token_ids_is_refused_for_there_are_none():
    with pytest.raises(RewardError, match="completion_ids"):
        FunctionReward("length", {"max_tokens": 3, "buffer_tokens": 2})


def test_a_reward_that_knows_the_answer_marks_its_figures():
    row = {"prompt": "q", "answer": "ab"}
    with FunctionReward(knows) as oracle, FunctionReward(lambda completions: [1.0]) as other:
        [marked] = best_of_n(ScriptedEngine(same("ab")), [row], oracle, num_samples=1)
        [plain] = best_of_n(ScriptedEngine(same("ab")), [row], other, num_samples=1)
    assert marked.counters["oracle"] == 1 and "oracle" not in plain.counters


@pytest.mark.parametrize(("num_samples", "max_tokens"), [(1, 3), (2, 9)])
def test_an_answer_that_the_budget_cuts_off_is_marked(num_samples, max_tokens):
    options = {"num_samples": num_samples, "max_tokens": max_tokens}
    with FunctionReward(lambda completions: [float(len(c)) for c in completions]) as reward:
        [best] = best_of_n(ScriptedEngine(same("abcdef")), ["q"], reward, **options)
        [free] = best_of_n(ScriptedEngine(same("abcdef")), ["q"], reward, num_samples=num_samples)
    [voted] = majority(ScriptedEngine(same("abcdef")), ["q"], **options)
    for result in (best, voted):
        assert result.over_budget and result.stop_reason == "max_tokens"
        assert result.num_generated_tokens == max_tokens
    assert free.stop_reason == "samples"


def test_a_length_of_its_own_is_no_budget():
    options = {"num_samples": 2, "max_new_tokens": 3, "max_tokens": 100}
    [result] = majority(ScriptedEngine(in_turn(["abcdef"] * 2)), ["q"], **options)
    assert result.finish == "length" and result.stop_reason == "samples"


def test_a_dialogue_is_read_with_all_its_turns_and_a_question_as_it_is():
    turns = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "first"},
        {"role": "assistant", "content": "reply"}, {"role": "user", "content": "second"},
    ]  # fmt: skip
    tokenizer = LetterTokenizer()
    assert make_prompt(tokenizer, {"messages": turns}).text == (
        "user: first\n\nassistant: reply\n\nuser: second"
    )
    assert make_prompt(tokenizer, {"messages": turns[:2]}).text == "first"


def test_a_score_that_is_none_is_none():
    with FunctionReward(lambda completions: [None]) as reward:
        [result] = best_of_n(ScriptedEngine(same("a")), ["q"], reward, num_samples=1)
    assert result.reward is None and not math.isnan(result.wall_s)


def test_a_section_may_be_a_config_of_its_own():
    given = {"rollout": RolloutConfig(temperature=0.5), "max_searches": 3}
    cfg = settings(RainConfig, None, given)
    assert cfg.rollout == RolloutConfig(temperature=0.5) and cfg.max_searches == 3
    with pytest.raises(ConfigError, match=r"rollout\.temperature"):
        settings(RainConfig, None, {"rollout": RolloutConfig(temperature=-1.0)})
