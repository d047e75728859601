import asyncio

import pytest

from rlalign.rewards.judge import llm_judge
from rlalign.rewards.verdict import RewardError, VerdictKind


def says(*texts):
    remaining = iter(texts)

    def answer(body):
        return 200, {"choices": [{"message": {"content": next(remaining)}}]}, {}

    return answer


def judge(one, text_prompt="2+2?", completion="4", answer="4", **params):
    reward = llm_judge(base_url=f"{one.url}/v1/", model="judge", **{"attempts": 1, **params})
    batch = {"prompts": [text_prompt], "completions": [completion], "answer": [answer]}
    return asyncio.run(reward(**batch))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Good. Score: 7", 0.7),
        ("Score: 2? No. **Score:** 9.5", 0.95),  # the last one counts
        ("score = 0", 0.0),
        ("Final score: 10/10", 1.0),
    ],
)
def test_the_last_score_is_mapped_onto_the_unit_interval(service, text, value):
    assert judge(service(says(text))).value == pytest.approx(value)


@pytest.mark.parametrize("text", ["I like it", "Score: high", "Score: 11", "Score: -1", ""])
def test_no_score_or_one_out_of_range_is_invalid(service, text):
    assert judge(service(says(text))).kind is VerdictKind.INVALID


def test_a_json_score_is_read_with_text_around_it(service):
    one = service(says('```json\n{"why": "x", "grade": 3}\n```', '{"grade": "A"}', "no json"))
    options = {"json_key": "grade", "min_score": 1, "max_score": 5}
    verdicts = [judge(one, **options) for _ in range(3)]
    assert [v.kind.value for v in verdicts] == ["ok", "invalid", "invalid"]
    assert verdicts[0].value == 0.5


def test_the_request_is_what_a_chat_endpoint_expects(service):
    one = service(says("Score: 5"))
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
    completion = [{"role": "assistant", "content": "{4}"}]
    template = "{prompt}|{completion}|{answer}"
    judge(one, prompt, completion, template=template, system="Judge.", request={"max_tokens": 9})
    assert one.bodies[0] == {
        "model": "judge",
        "temperature": 0,
        "max_tokens": 9,
        "messages": [
            {"role": "system", "content": "Judge."},
            {"role": "user", "content": "system: be brief\n\nuser: 2+2?|{4}|4"},
        ],
    }


def test_columns_of_the_template_are_required():
    reward = llm_judge("http://x", "m", template="{prompt} {completion} {answer} {rubric}")
    assert reward.required_columns == ("answer", "rubric")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"template": "{prompt}"}, "does not name {completion}"),
        ({"pattern": "Score"}, "captures nothing"),
        ({"min_score": 5, "max_score": 5}, "min_score"),
    ],
)
def test_a_judge_that_cannot_work_is_refused(params, message):
    with pytest.raises(RewardError, match=message):
        llm_judge("http://x", "m", **params)
