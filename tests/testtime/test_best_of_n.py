"""Best-of-N keeps the best, counts what it cost, and stays within its budgets."""

from __future__ import annotations

import pytest

from rlalign.config.load import ConfigError
from rlalign.tasks.mini import get_mini_task
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.rewards import FunctionReward
from tests.testtime.search_fakes import ScriptedEngine, in_turn


def scored(table):
    return FunctionReward(lambda prompts, completions: [table.get(c) for c in completions])


def test_the_highest_reward_wins_the_earliest_of_equals_and_no_score_comes_last():
    texts = ["none", "low", "top", "top2"]
    engine = ScriptedEngine(in_turn(texts))
    reward = scored({"low": -3.0, "top": 2.0, "top2": 2.0})
    [result] = best_of_n(engine, ["q"], reward, num_samples=4)
    assert result.text == "top" and result.reward == 2.0 and result.stop_reason == "samples"
    assert result.trace == {
        "method": "best_of_n",
        "samples": [
            {"text": "none", "reward": None},
            {"text": "low", "reward": -3.0},
            {"text": "top", "reward": 2.0},
            {"text": "top2", "reward": 2.0},
        ],
    }
    assert result.num_generated_tokens == sum(len(text) + 1 for text in texts)
    assert result.num_prefill_tokens == 4 and result.num_reward_calls == 4
    assert len(engine.rounds) == 1


def test_a_low_score_is_better_than_none():
    [result] = best_of_n(
        ScriptedEngine(in_turn(["none", "low"])), ["q"], scored({"low": -3.0}), num_samples=2
    )
    assert result.text == "low" and result.reward == -3.0


def test_without_any_score_the_first_is_returned():
    engine = ScriptedEngine(in_turn(["a", "b"]))
    [result] = best_of_n(engine, ["q"], scored({}), num_samples=2)
    assert result.text == "a" and result.reward is None
    assert result.to_json()["reward"] is None


@pytest.mark.parametrize(
    ("budget", "drawn", "tokens"), [(1, 1, 1), (5, 1, 5), (6, 2, 6), (10, 2, 10), (15, 3, 15)]
)
def test_a_budget_of_tokens_is_never_exceeded_and_the_best_so_far_returned(budget, drawn, tokens):
    engine = ScriptedEngine(lambda prompt, seed, temperature: "aaaa")
    reward = FunctionReward(lambda prompts, completions: [float(len(c)) for c in completions])
    [result] = best_of_n(engine, ["q"], reward, num_samples=4, max_tokens=budget)
    assert result.stop_reason == "max_tokens" and result.over_budget
    assert result.num_generated_tokens == tokens and len(result.trace["samples"]) == drawn
    assert result.reward == float(min(budget, 4))
    assert result.finish == ("stop" if budget >= 5 else "length")


def test_a_budget_that_is_not_reached_changes_nothing():
    def say(prompt, seed, temperature):
        return f"{seed % 1000}"

    reward = FunctionReward(lambda prompts, completions: [float(c) for c in completions])
    whole = best_of_n(ScriptedEngine(say), ["q"], reward, num_samples=5)
    bound = best_of_n(
        ScriptedEngine(say), ["q"], reward, num_samples=5, max_tokens=1000, max_wall_s=1e6
    )
    assert [r.trace for r in whole] == [r.trace for r in bound]
    assert bound[0].stop_reason == "samples"


def test_no_time_at_all_still_gives_one_answer():
    engine = ScriptedEngine(in_turn(["a", "b"]))
    [result] = best_of_n(engine, ["q"], scored({"a": 1.0}), num_samples=2, max_wall_s=1e-9)
    assert result.text == "a" and result.stop_reason == "max_wall_s"


def test_samples_of_a_prompt_depend_on_its_id_and_the_seed_alone():
    engine = open_engine("mini:chain")
    rows = [
        dict(row, id=f"r{i}") for i, row in enumerate(get_mini_task("chain").make_rows("eval")[:4])
    ]
    reward = FunctionReward(lambda prompts, completions: [float(len(c)) for c in completions])
    options = {"num_samples": 3, "max_new_tokens": 40}
    together = best_of_n(engine, rows, reward, **options)
    alone = [best_of_n(engine, [row], reward, **options)[0] for row in reversed(rows)]
    assert [r.trace for r in together] == [r.trace for r in reversed(alone)]
    assert best_of_n(engine, rows, reward, seed=1, **options)[0].trace != together[0].trace


def test_equal_prompts_of_two_ids_draw_otherwise():
    def seeds(*ids):
        engine = ScriptedEngine(lambda prompt, seed, temperature: "a")
        given = [{"prompt": "q", "id": name} for name in ids]
        best_of_n(engine, given, scored({}), num_samples=3)
        return [request.seed for asked in engine.rounds for request in asked]

    assert len(set(seeds("one", "two"))) == 6
    assert seeds("two") == seeds("one", "two")[3:]  # whatever place it has


def test_wrong_options_are_refused_and_a_bad_prompt_spares_the_others():
    engine = ScriptedEngine(lambda prompt, seed, temperature: "a")
    with pytest.raises(ConfigError, match="num_sample"):
        best_of_n(engine, ["q"], scored({}), num_sample=3)
    good, bad, long = best_of_n(engine, ["q", {"x": 1}, "y" * 200], scored({"a": 1.0}))
    assert good.text == "a" and not good.error
    assert bad.error.startswith("DecodeError") and "no token can follow" in long.error
