"""Majority voting: the commonest answer wins, whatever it is spelled like."""

from __future__ import annotations

import math

import pytest

from rlalign.tasks.mini import get_mini_task
from rlalign.testtime.answers import is_right, make_extract
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.majority import majority
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.rewards import FunctionReward
from tests.testtime.search_fakes import ScriptedEngine, in_turn


def vote(texts, table=None, **options):
    engine = ScriptedEngine(in_turn(texts))
    reward = None
    if table is not None:
        reward = FunctionReward(lambda prompts, completions: [table.get(c) for c in completions])
    [result] = majority(engine, ["q"], reward, num_samples=len(texts), **options)
    return result


def test_spellings_of_one_answer_vote_together_and_the_earliest_of_them_is_returned():
    result = vote(["it is 7", "so 1,000", "7", "hence 1000.0", "thus 1e3"])
    assert result.text == "so 1,000" and result.reward is None
    assert result.trace["answers"] == [
        {"answer": "1,000", "votes": 3, "samples": [1, 3, 4]},
        {"answer": "7", "votes": 2, "samples": [0, 2]},
    ]
    assert [s["answer"] for s in result.trace["samples"]] == ["7", "1,000", "7", "1000.0", "1e3"]
    assert result.trace["method"] == "majority" and result.stop_reason == "samples"


def test_of_equal_votes_the_earlier_answer_wins():
    assert vote(["1", "2", "2", "1"]).text == "1"


def test_samples_without_an_answer_do_not_vote():
    result = vote(["no", "no", "<answer>3</answer>"], extract="tag")
    assert result.text == "<answer>3</answer>" and result.counters["num_without_answer"] == 2
    none = vote(["x", "y"], extract="tag")
    assert none.text == "x" and none.trace["answers"] == []


def test_votes_are_weighted_by_the_reward_and_the_best_of_the_winners_returned():
    table = {"it is 1": 0.2, "1": 0.3, "2": 0.9, "so 2": None, "the 3": -5.0}
    result = vote([*table], table)
    assert [(a["answer"], a["votes"]) for a in result.trace["answers"]] == [
        ("2", pytest.approx(0.9)),
        ("1", pytest.approx(0.5)),
        ("3", 0.0),
    ]
    assert result.text == "2" and result.reward == 0.9
    assert vote(["1", "1 ", "2"], {"1": 0.4, "1 ": 0.45, "2": 0.8}).text == "1 "


def test_negative_rewards_weigh_by_their_exponential_or_else_all_count_the_same():
    table = {"2": -0.1, "1": -3.0, "it is 1": -3.0}
    assert vote([*table], table, weight="exp").text == "2"
    votes = vote([*table], table, weight="exp").trace["answers"]
    assert votes[0]["votes"] == pytest.approx(math.exp(-0.1))
    assert votes[1]["votes"] == pytest.approx(2 * math.exp(-3))
    assert vote([*table], table).text == "1"  # all weigh 0: two samples against one


def test_a_budget_gives_the_majority_so_far():
    engine = ScriptedEngine(in_turn(["1", "2", "2", "1", "1"]))
    [result] = majority(engine, ["q"], num_samples=5, max_tokens=6)
    assert result.text == "2" and result.stop_reason == "max_tokens"
    assert result.num_generated_tokens == 6


def test_a_wrong_rule_is_known_before_anything_is_drawn():
    engine = ScriptedEngine(in_turn([]))
    with pytest.raises(DecodeError, match="boxd"):
        majority(engine, ["q"], extract="boxd")
    assert not engine.rounds


def test_on_a_model_it_is_right_where_most_samples_are():
    engine = open_engine("mini:chain")
    rows = get_mini_task("chain").make_rows("eval")[:40]
    find = make_extract("tag")
    results = majority(engine, rows, num_samples=9, max_new_tokens=64, extract="tag")
    for row, result in zip(rows, results, strict=True):
        right = [is_right(s["text"], row["answer"], find) for s in result.trace["samples"]]
        if sum(right) > 4:
            assert is_right(result.text, row["answer"], find)
        if is_right(result.text, row["answer"], find):
            assert sum(right) >= max(
                sum(s["answer"] == other for s in result.trace["samples"])
                for other in {s["answer"] for s in result.trace["samples"]} - {None}
            )
