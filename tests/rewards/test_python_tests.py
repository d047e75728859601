import time

import pytest

from rlalign.rewards import sandbox
from rlalign.rewards.python_tests import code_of, python_tests, read_tests
from rlalign.rewards.verdict import RewardError, VerdictKind

DOUBLE = "Sure:\n```python\ndef f(x):\n    return 2 * x\n```\nDone."


def score(text, tests, **params):
    reward = python_tests(**{"num_workers": 2, "cpu_s": 1, **params})
    (verdict,) = reward(completions=[text], tests=[tests])
    return verdict


def test_all_tests_or_the_share_of_them():
    tests = ["assert f(2) == 4", "assert f(3) == 6", "assert f(3) == 7", "assert f(0) == 0"]
    assert score(DOUBLE, tests[:2]).value == 1.0
    assert score(DOUBLE, tests).value == 0.0
    assert score(DOUBLE, tests, partial=True).value == 0.75


def test_input_output_pairs_run_one_process_each():
    code = "```python\nimport os\nprint(int(input()) + 1, ' ')\nopen('left', 'x')\n```"
    pairs = [{"input": "1", "output": "2"}, {"input": "5\n", "output": "6\n"}]
    assert score(code, pairs).value == 1.0
    pairs.append({"input": "1", "output": "1"})
    assert score(code, pairs).value == 0.0
    assert score(code, pairs, partial=True).value == pytest.approx(2 / 3)


def test_no_code_is_a_wrong_answer_and_no_tests_do_not_apply():
    assert score("I cannot", ["assert True"]).value == 0.0
    verdict = score(DOUBLE, None)
    assert (verdict.kind, verdict.value) == (VerdictKind.OK, None)


@pytest.mark.parametrize("tests", [3, [], [1, 2], {"a": 1}, ["assert True", {"input": ""}]])
def test_a_row_without_usable_tests_is_invalid(tests):
    assert score(DOUBLE, tests).kind is VerdictKind.INVALID


def test_a_limit_is_masked_unless_it_has_a_score_of_its_own():
    endless = "```python\nwhile True: pass\n```"
    assert score(endless, ["assert True"], wall_s=0.5).kind is VerdictKind.TIMEOUT
    assert score(endless, ["assert True"], wall_s=0.5, failure_score=-0.5).value == -0.5


def test_order_is_kept_and_the_deadline_covers_the_whole_batch():
    texts = [f"```python\nx = {i}\n```" for i in range(4)] + [
        "```\nimport time; time.sleep(60)\n```"
    ]
    tests = [["assert x % 2 == 0"]] * 5 + [["assert True"]]
    reward = python_tests(num_workers=1, deadline_s=3.0)
    start = time.monotonic()
    verdicts = reward(completions=[*texts, DOUBLE], tests=tests)
    assert time.monotonic() - start < 10
    assert [v.value for v in verdicts[:4]] == [1, 0, 1, 0]
    assert [v.kind for v in verdicts[4:]] == [VerdictKind.TIMEOUT] * 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```\n```py\nb\n```", "b\n"),
        ("```\na\n```\n```bash\nb\n```", "a\n"),
        ("```python\na\n```\n```\noutput\n```", "a\n"),
        ("```bash\nb\n```", None),
        ("plain", None),
    ],
)
def test_the_last_python_block_is_the_code(text, code):
    assert code_of(text) == code


def test_one_string_is_one_test():
    assert read_tests("assert True") == ([], ["assert True"])


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(RewardError, match="memory_bytes = 0"):
        python_tests(memory_bytes=0)


@pytest.mark.parametrize("absent", ["network", "files"])
def test_a_kernel_that_cannot_isolate_is_refused_unless_allowed(monkeypatch, absent):
    active = {"network": True, "files": True, "limits": True, absent: False}
    monkeypatch.setattr(sandbox, "isolation", lambda: active)
    with pytest.raises(RewardError, match=f"lacks isolation of .*{absent}.*allow_weak_isolation"):
        python_tests().load()
    python_tests(allow_weak_isolation=True).load()


def test_closing_begins_no_further_program():
    reward = python_tests()
    reward.close()
    (verdict,) = reward(completions=[DOUBLE], tests=[["assert True"]])
    assert verdict.kind is VerdictKind.TIMEOUT
