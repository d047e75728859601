import pytest

from rlalign.rewards.text import exact_match, format, length, normalise, regex, repetition
from rlalign.rewards.verdict import RewardError


def match(text, answer, **params):
    return exact_match(**params)(completions=[text], answer=[answer])[0]


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("<think>84-9=75</think><answer>83</answer>", "83", 1.0),
        ("<answer>83</answer>", 83, 1.0),
        ("<answer>1</answer> no, <answer>2</answer>", "2", 1.0),  # the last one counts
        ("<answer>2</answer> no, <answer>1</answer>", "2", 0.0),
        ("83", "83", 0.0),  # no tag
        ("<answer>\n $1,000. </answer>", "1000", 1.0),
        ("<answer>2.50</answer>", "2.5", 1.0),
        ("<answer>1,00</answer>", "100", 0.0),  # not a thousands separator
        ("<answer>New  York</answer>", "new york", 1.0),
        ("<answer>b</answer>", ["a", "b"], 1.0),  # alternatives
        ("<answer></answer>", "0", 0.0),
        ("<answer>-0.0</answer>", "0", 1.0),
        ("<answer>83</answer>", None, None),  # does not apply
    ],
)
def test_exact_match(text, answer, score):
    assert match(text, answer) == score


def test_exact_match_options():
    assert match("the end: 7", "7", pattern=r"end: (\d)") == 1.0
    assert match("seven", "seven", pattern=None) == 1.0
    assert match("<answer>A</answer>", "a", ignore_case=False) == 0.0
    assert match("<answer>1.0</answer>", "1", numbers=False) == 0.0


def test_exact_match_reads_chat_completions():
    completion = [{"role": "assistant", "content": "<answer>5</answer>"}]
    assert exact_match()(completions=[completion], answer=["5"]) == [1.0]


@pytest.mark.parametrize("text", ["1", "1.0", "+1", " 1. ", "$1", "01", "1.", "１"])
def test_spellings_of_one_number_are_one(text):
    assert normalise(text) == "1"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1.0),
        ("<think></think><answer></answer>\n", 1.0),
        ("so <think>a</think><answer>c</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0.0),  # two answers: hedging
        ("<think>a</think><think>a</think><answer>1</answer>", 0.0),
    ],
)
def test_format_wants_each_tag_once(text, score):
    assert format()(completions=[text]) == [score]


def test_regex_full_or_anywhere():
    texts = ["ab", "cab", ""]
    assert regex("ab")(completions=texts) == [1.0, 0.0, 0.0]
    assert regex("ab", full=False)(completions=texts) == [1.0, 1.0, 0.0]
    assert regex("b", full=False, score=0.0, otherwise=-1.0)(completions=texts) == [0.0, 0.0, -1.0]


@pytest.mark.parametrize("build", [lambda: regex("(a"), lambda: exact_match(pattern="a")])
def test_a_pattern_that_cannot_work_is_refused(build):
    with pytest.raises(RewardError, match=r"regular expression|captures nothing"):
        build()


def test_length_is_flat_inside_and_falls_linearly_outside():
    reward = length(min_tokens=10, max_tokens=20, buffer_tokens=5)
    lengths = [0, 5, 8, 10, 15, 20, 21, 25, 40]
    scores = reward(completion_ids=[[0] * n for n in lengths])
    assert scores == pytest.approx([-1, -1, -0.4, 0, 0, 0, -0.2, -1, -1])


def test_repetition_counts_distinct_ngrams_by_hand():
    # a b a b a: bigrams ab ba ab ba -> 2 distinct of 4
    assert repetition(ngram_size=2)(completions=["a b a b a"]) == [-0.5]
    assert repetition(ngram_size=2, max_penalty=0.5)(completions=["A b a B a"]) == [-0.25]
    assert repetition(ngram_size=3)(completions=["a b", "", "a b c d"]) == [0.0, 0.0, 0.0]
