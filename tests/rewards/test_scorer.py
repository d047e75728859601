import math
import threading
import time

import pytest
import torch

from rlalign.config.schema import AlgoConfig, OverlongConfig, RewardSpec
from rlalign.rewards import RewardError
from tests.rewards.rows import groups

ANSWERS = groups(
    ("1+1", "2", ["<answer>2</answer>", "<answer>3</answer>"]),
    ("2+2", "4", ["<answer>4</answer>"]),
)


def test_weighted_sum_by_hand(scorer):
    functions = {"a": lambda completions: [1, None, None], "b": lambda completions: [2, 3, None]}
    specs = [RewardSpec(name="a", weight=0.5), RewardSpec(name="b", weight=-1.0)]
    scores = scorer(*specs, functions=functions).score(ANSWERS)
    assert scores.reward_B[:2].tolist() == [0.5 * 1 - 2, -3.0]
    assert math.isnan(scores.reward_B[2])  # nothing applies: masked, not 0
    assert scores.errors == {}


def test_a_failed_verdict_masks_the_sample_whatever_the_others_say(scorer):
    functions = {"good": lambda completions: [1.0] * 3, "bad": lambda completions: [1, math.nan, 1]}
    scores = scorer("good", "bad", functions=functions).score(ANSWERS)
    assert scores.reward_B.isnan().tolist() == [False, True, False]
    assert scores.by_function["good"].tolist() == [1.0, 1.0, 1.0]
    assert scores.by_function["bad"].isnan().tolist() == [False, True, False]
    assert scores.errors == {"invalid": 1}


def test_order_of_ragged_groups_is_kept_with_user_functions_in_workers(scorer, module):
    name = module(
        "async def f(prompts, completions, answer, level, completion_ids, **other):\n"
        "    assert not other, other\n"
        "    return [100 * int(p) + 10 * int(c) + l + len(i) for p, c, l, i in\n"
        "            zip(prompts, completions, level, completion_ids)]\n"
    )
    rows = groups(
        ("1", "x", ["1", "2"]), ("2", "x", ["3"]), ("3", "x", list("456")), level=[1, 2, 3]
    )
    reward_B = scorer(f"{name}:f").score(rows).reward_B
    assert reward_B.tolist() == [112, 122, 233, 344, 354, 364]


def test_chat_prompts_give_chat_completions(scorer):
    def check(prompts, completions):
        pairs = list(zip(prompts, completions, strict=True))
        assert all(isinstance(p, list) == isinstance(c, list) for p, c in pairs)
        return [float(c) if isinstance(c, str) else float(c[0]["content"]) for c in completions]

    rows = groups(([{"role": "user", "content": "q"}], None, ["7"]), ("q", None, ["8"]))
    assert scorer("check", functions={"check": check}).score(rows).reward_B.tolist() == [7.0, 8.0]


def test_columns_of_other_prompts_are_none(scorer):
    rows = groups(("q", None, ["a"]), ("q", None, ["b"]))
    rows[1].prompt.columns["level"] = 3  # type: ignore[index]
    seen = []

    def look(completions, level):
        seen.extend(level)
        return [0.0] * 2

    scorer("look", functions={"look": look}).score(rows)
    assert seen == [None, 3]


def test_functions_run_at_the_same_time(scorer, module):
    source = (
        "import asyncio\nasync def f(completions):\n    await asyncio.sleep(1.0)\n    return [1]*3"
    )
    name = module(source)
    one = scorer(*[f"{name}:f"] * 4)
    start = time.monotonic()
    scores = one.score(ANSWERS)
    assert time.monotonic() - start < 3.5  # one after the other: 4 s
    assert list(scores.by_function) == ["f", "f_2", "f_3", "f_4"]


def test_too_many_failures_stop_the_run_with_reason_example_and_fix(scorer, module):
    name = module("def f(completions):\n    raise KeyError('the missing thing')")
    with pytest.raises(RewardError) as error:
        scorer(f"{name}:f", max_error_rate=0.5).score(ANSWERS)
    message = str(error.value)
    for part in ("'f'", "3 of 3", "3 crash", "test/0", "the missing thing", "max_error_rate = 0.5"):
        assert part in message


def test_failures_up_to_the_limit_only_mask(scorer, caplog):
    flaky = {"flaky": lambda completions: [1.0, 1.0, "no"]}
    scores = scorer("flaky", functions=flaky, max_error_rate=0.34).score(ANSWERS)
    assert scores.errors == {"invalid": 1}
    assert "1 of 3 verdicts failed" in caplog.text
    with pytest.raises(RewardError):
        scorer("flaky", functions=flaky, max_error_rate=0.33).score(ANSWERS)


def test_a_failing_function_is_not_hidden_by_many_good_ones(scorer):
    functions = {f"good{i}": lambda completions: [1.0] * 3 for i in range(5)}
    functions["bad"] = lambda completions: [None] * 2
    with pytest.raises(RewardError, match="'bad'"):
        scorer(*functions, functions=functions, max_error_rate=0.2).score(ANSWERS)


def test_a_hanging_user_function_is_masked_in_time_and_the_next_step_works(scorer, module):
    name = module(
        "import time\ncalls = []\ndef f(completions, answer):\n"
        "    if answer[0] == 'hang': time.sleep(60)\n    return [1.0] * len(completions)"
    )
    one = scorer(f"{name}:f", timeout_s=1.0)
    start = time.monotonic()
    scores = one.score(groups(("q", "hang", ["a", "b"])))
    assert time.monotonic() - start < 10
    assert scores.errors == {"timeout": 2}
    assert scores.reward_B.isnan().all()
    assert one.score(ANSWERS).reward_B.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([RewardSpec("exact_match"), RewardSpec("bonus", weight=3.0)], [1, 0, 1]),
        ([RewardSpec("exact_match"), RewardSpec("bonus", accuracy=True)], [0.5] * 3),
        ([RewardSpec("bonus", weight=3.0)], [0.5] * 3),
        ([RewardSpec("bonus"), RewardSpec("other", weight=2.0)], [2.5] * 3),
    ],
)
def test_accuracy_is_the_marked_the_only_or_the_built_in_correctness(scorer, specs, expected):
    functions = {"bonus": lambda completions: [0.5] * 3, "other": lambda completions: [1.0] * 3}
    algo = AlgoConfig(overlong=OverlongConfig(90, 4.0))
    scores = scorer(*specs, functions=functions, algo=algo).score(ANSWERS)
    assert scores.acc_B.tolist() == expected
    assert (scores.reward_B < sum(s.weight for s in specs)).all()  # shaping touches the reward only


def test_two_accuracies_are_refused(scorer):
    specs = [RewardSpec("exact_match", accuracy=True), RewardSpec("math", accuracy=True)]
    with pytest.raises(RewardError, match="mark one at most"):
        scorer(*specs)


def test_overlong_punishment_by_hand(scorer):
    algo = AlgoConfig(overlong=OverlongConfig(20, 2.0))  # limit 100
    rows = groups(("q", None, ["x" * n for n in (10, 80, 90, 100)]))
    scores = scorer("one", functions={"one": lambda completions: [1.0] * 4}, algo=algo).score(rows)
    assert scores.reward_B.tolist() == pytest.approx([1.0, 1.0, 0.0, -1.0])
    assert scores.acc_B.tolist() == [1.0] * 4


def test_normalize_then_sum_by_hand(scorer):
    values = {"a": [0.0, 1.0, 5.0, 9.0, 7.0], "b": [100.0, 300.0, 4.0, 4.0, 4.0]}
    functions = {
        "a": lambda completions: values["a"],
        "b": lambda completions: values["b"],
    }
    specs = [RewardSpec("a", weight=1.0), RewardSpec("b", weight=0.5)]
    rows = groups(("q", None, ["x", "y"]), ("q", None, ["x", "y", "z"]))
    one = scorer(*specs, functions=functions, aggregation="normalize_then_sum")
    scores = one.score(rows)
    half = 1 / math.sqrt(2)  # two values: mean +- sd / sqrt(2), with the n - 1 divisor
    expected = [-1.5 * half, 1.5 * half, -1.0, 1.0, 0.0]
    assert scores.reward_B.tolist() == pytest.approx(expected, abs=1e-4)
    assert scores.acc_B.tolist() == pytest.approx([50, 151, 7, 11, 9])


def test_a_column_that_is_not_there_is_an_error_before_any_call(scorer, module):
    name = module("def f(completions, difficulty): raise SystemExit")
    with pytest.raises(RewardError, match=r"'f' requires 'difficulty'.*columns: answer"):
        scorer(f"{name}:f").score(ANSWERS)


def test_no_groups_no_scores(scorer):
    assert scorer("exact_match").score([]).reward_B.shape == (0,)


def test_closing_while_scoring_ends_both(scorer, module, tmp_path):
    begun, release = threading.Event(), threading.Event()
    marker = tmp_path / "begun"

    def stuck(completions):
        begun.set()
        release.wait(20)

    source = f"def f(completions):\n    open({str(marker)!r}, 'w').close()\n    time.sleep(60)"
    name = module("import time\n" + source)
    one = scorer(f"{name}:f", "stuck", functions={"stuck": stuck})
    result = []
    thread = threading.Thread(target=lambda: result.append(one.score(ANSWERS)))
    thread.start()
    deadline = time.monotonic() + 20
    while not (begun.is_set() and marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    one.close()
    thread.join(10)
    assert not thread.is_alive()
    release.set()
    assert result[0].errors == {"crash": 6}
    with pytest.raises(RewardError, match="closed"):
        one.score(ANSWERS)


def test_scores_are_float32_and_nan_only_where_masked(scorer):
    scores = scorer("exact_match").score(ANSWERS)
    assert scores.reward_B.dtype == scores.acc_B.dtype == torch.float32
    assert scores.reward_B.tolist() == scores.acc_B.tolist() == [1.0, 0.0, 1.0]
