"""RAIN as a whole, on a random model and on one that was trained for seconds."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from benchmarks._moods import open_moods, pleasant, rows
from rlalign.models.random import write_random_model
from rlalign.testtime import rain_run
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.embed import Embeddings, NGrams
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.rain import rain
from rlalign.testtime.rewards import FunctionReward

QUICK = {"max_searches": 12, "min_fresh": 4, "min_visits": 2, "num_candidates": 4}
TEXTS = ["ab", "Hello", "3+4=?", "zz", "why", "a b c", "x", "what is"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    return open_engine(str(write_random_model(folder, "qwen2", max_positions=64)))


@pytest.fixture(scope="module")
def moods():
    return open_moods(steps=200)


def vowels(prompts, completions, **_):
    """A rule that is met now and then: 1 with a vowel among the first four characters."""
    return [1.0 if set(text[:4]) & set("aeiou") else -1.0 for text in completions]


def always(value: float):
    def constant(prompts, completions, **_):
        return [value] * len(completions)

    return FunctionReward(constant)


def ask(engine, texts, scorer=None, **options):
    results = rain(engine, texts, scorer or FunctionReward(vowels), **{**QUICK, **options})
    assert not any(result.error for result in results), results
    return results


def tokens(results):
    return [result.token_ids for result in results]


def test_without_searches_and_with_a_blind_scorer_it_is_greedy_decoding(engine):
    greedy = best_of_n(engine, TEXTS, always(0.0), num_samples=1, temperature=0, max_new_tokens=20)
    none = ask(engine, TEXTS, max_searches=0, max_new_tokens=20)
    assert tokens(none) == tokens(greedy)
    assert {result.stop_reason for result in none} == {"greedy"}
    for compat in ("fixed", "official"):
        blind = ask(
            engine, TEXTS, always(1.0), c_puct=1e-6, gamma_sim=0.0, max_children=0,
            max_new_tokens=20, compat=compat,
        )  # fmt: skip
        assert tokens(blind) == tokens(greedy)


def test_trees_side_by_side_and_in_any_order_are_those_alone(engine):
    given = [{"id": text, "prompt": text} for text in TEXTS[:5]]
    alone = ask(engine, given, in_flight=1, max_new_tokens=8)
    for in_flight in (4, 16):
        many = ask(engine, given, in_flight=in_flight, max_new_tokens=8)
        assert tokens(many) == tokens(alone)
        assert [result.trace["commits"] for result in many] == [
            result.trace["commits"] for result in alone
        ]
    order = list(range(len(given)))
    random.Random(0).shuffle(order)
    mixed = ask(engine, [given[i] for i in order], max_new_tokens=8)
    assert tokens(mixed) == [alone[i].token_ids for i in order]
    other = ask(engine, given, seed=1, max_new_tokens=8)
    assert tokens(other) != tokens(alone)


def test_the_shape_of_the_tree_and_the_number_of_searches(engine):
    for result in ask(engine, TEXTS, max_new_tokens=24, max_children=6):
        trace, counters = result.trace, result.counters
        nodes = {node["id"]: node for node in trace["nodes"]}
        children: dict[int, list[dict]] = {}
        for node in trace["nodes"]:
            children.setdefault(node["parent"], []).append(node)
        assert trace["dropped"] == 0 and len(nodes) == len(trace["nodes"])
        assert max(map(len, children.values())) <= 6
        searches = sum(commit["searches"] for commit in trace["commits"])
        assert searches == counters["searches"]
        # Each search expands at most one leaf into 4 and may add one child on each level.
        assert len(nodes) <= 1 + searches * (4 + 4)
        assert [nodes[c["node"]]["depth"] for c in trace["commits"]] == [
            *range(1, len(trace["commits"]) + 1)
        ]
        lengths = [1, 2, 4, *[10] * 9][: len(trace["commits"])]
        assert len(result.token_ids) <= sum(lengths)
        assert len(result.token_ids) > sum(lengths[:-1])
        # A root is passed by its own searches alone, so what it had before it inherited.
        inherited = [0] + [
            nodes[commit["node"]]["visits"] - later["searches"]
            for commit, later in itertools.pairwise(trace["commits"])
        ]
        for commit, before in zip(trace["commits"], inherited, strict=True):
            assert 1 <= commit["searches"] <= max(12 - before, 4)
        assert max(inherited) > 0
        assert 1 not in result.token_ids[:-1]
        for node in trace["nodes"]:
            assert node["n"] >= node["visits"] - 1e-9 and -1 <= node["q"] <= 1


def test_a_good_word_is_found_more_often_than_by_greedy_and_by_one_sample(moods):
    scorer, names = FunctionReward(pleasant), rows(26)[13:21]

    def good(results):
        return sum(result.reward == 1 for result in results)

    greedy = rain(moods, names, scorer, max_searches=0)
    sampled = best_of_n(moods, names, scorer, num_samples=1)
    found = rain(moods, names, scorer)
    assert good(found) >= 7 > 4 >= max(good(greedy), good(sampled))
    assert {result.finish for result in found} == {"stop"}
    assert all(result.num_generated_tokens > len(result.token_ids) for result in found)


def test_where_all_is_bad_it_ends_all_the_same_and_says_so(engine):
    for result in ask(engine, TEXTS[:3], always(-1.0), max_new_tokens=9):
        assert result.finish in ("stop", "length") and result.reward == -1
        assert all(commit["searches"] <= 12 for commit in result.trace["commits"])
        assert all(commit["below_threshold"] for commit in result.trace["commits"])
        assert result.counters["below_threshold"] == len(result.trace["commits"])


def test_refuse_gives_nothing_and_restart_begins_anew_with_other_draws(engine):
    for result in ask(engine, TEXTS[:3], always(-1.0), on_fail="refuse", max_new_tokens=9):
        assert (result.text, result.token_ids, result.stop_reason) == ("", (), "refused")
        assert result.reward is None
    plain, anew = (
        ask(engine, TEXTS[:3], always(-1.0), on_fail=kind, max_new_tokens=9)
        for kind in ("commit", "restart")
    )
    assert [result.counters["restarts"] for result in anew] == [2, 2, 2]
    assert tokens(anew) != tokens(plain) and all(result.token_ids for result in anew)
    good = ask(engine, TEXTS[:3], always(1.0), on_fail="restart", max_new_tokens=9)
    assert all("restarts" not in result.counters for result in good)


@pytest.mark.parametrize(
    "budget", [{"max_total_searches": 9}, {"max_tokens": 150}, {"max_wall_s": 1e-9}]
)
def test_a_budget_gives_the_best_so_far(moods, budget):
    [name] = budget
    scorer = FunctionReward(pleasant)
    for result in rain(moods, rows(4), scorer, **budget):
        assert result.stop_reason == name and result.over_budget and not result.error
        assert result.token_ids and result.reward == pleasant([""], [result.text])[0]
        searches = {"max_total_searches": 9, "max_tokens": 10**6, "max_wall_s": 1}
        assert 1 <= result.counters["searches"] <= searches[name]
        if name == "max_tokens":
            # At most what one search draws: ten sets of ten and a continuation.
            assert 150 <= result.num_generated_tokens <= 150 + 110
    full = rain(moods, rows(4), scorer, max_total_searches=10**6)
    assert [r.token_ids for r in full] == [r.token_ids for r in rain(moods, rows(4), scorer)]


def test_inherited_visits_may_be_enough(moods):
    scorer = FunctionReward(pleasant)
    options = {"min_visits": 1, "value_threshold": 0.0}
    usual = rain(moods, rows(6), scorer, **options)
    least = rain(moods, rows(6), scorer, min_fresh=0, **options)
    counts = [[c["searches"] for c in result.trace["commits"]] for result in least]
    assert any(0 in count for count in counts)
    assert not any(0 in [c["searches"] for c in result.trace["commits"]] for result in usual)


def test_leaves_looked_at_together_take_fewer_rounds_and_find_the_same_kind(moods):
    scorer = FunctionReward(pleasant)
    results = rain(moods, rows(8), scorer, leaf_parallel=4)
    assert sum(result.reward == 1 for result in results) >= 7
    assert all(result.counters["searches"] > 0 and not result.error for result in results)
    for result in results:
        assert all(abs(n["n"]) >= n["visits"] - 1e-9 for n in result.trace["nodes"])


def test_one_bad_prompt_does_not_stop_the_others(engine):
    results = rain(engine, ["x" * 70, "ab"], FunctionReward(vowels), max_new_tokens=4, **QUICK)
    assert "context" in results[0].error and results[0].finish == "error"
    assert results[1].token_ids and not results[1].error


def test_the_model_judges_itself_where_no_scorer_is_given(tmp_path):
    engine = open_engine(str(write_random_model(tmp_path, "qwen2", max_positions=2048)))
    [result] = rain(engine, ["Hello"], max_new_tokens=4, **QUICK)
    assert result.reward in (-1, 0, 1) and result.num_reward_calls > 2
    # Two options, asked in both orders; nothing else reads as long a prompt.
    assert result.num_prefill_tokens > 2 * 3000 and not result.error


def test_what_is_embedded_is_what_each_node_of_the_path_began(moods, monkeypatch):
    calls, scored = [], []

    class Recorder(NGrams):
        def embed(self, texts):
            calls.append(list(texts))
            return super().embed(texts)

    def rule(prompts, completions, **_):
        scored.extend(completions)
        return pleasant(prompts, completions)

    embeddings = Embeddings(Recorder())
    monkeypatch.setattr(rain_run, "load_embeddings", lambda name: embeddings)
    [result] = rain(moods, rows(14)[13:], FunctionReward(rule), max_total_searches=25)
    assert result.trace["commits"] == [] and max(map(len, calls)) > 1
    assert len(scored) == len(set(scored))
    for texts in calls:
        assert texts[0] in scored
        for longer, shorter in itertools.pairwise(texts):
            assert longer.endswith(shorter) and len(longer) > len(shorter)


def test_a_scorer_without_an_answer_counts(engine):
    for result in ask(engine, TEXTS[:2], always(math.nan), max_new_tokens=4):
        assert result.counters["unscored"] > 0 and result.reward is None


def test_options_that_make_no_sense_are_refused(engine):
    with pytest.raises(DecodeError):
        ask(engine, TEXTS, set_lengths=[])


def test_a_budget_that_ends_with_a_tree_given_up_returns_what_is_there(engine):
    options = {"on_fail": "restart", "max_searches": 12, "max_total_searches": 12}
    [result] = ask(engine, TEXTS[:1], always(-1.0), max_new_tokens=8, **options)
    assert result.token_ids and result.stop_reason == "max_total_searches"
    assert result.counters["searches"] == 12
