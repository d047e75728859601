"""Completions that the data brings along: the same groups from every form, tokens as the policy
would have drawn them, and what can be wrong named with its row, its value and the fix."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rlalign.config import ScoredConfig, TaskConfig
from rlalign.models.tokenizer import build_tokenizer
from rlalign.tasks import ScoredSet, TaskError, load_prompts, load_scored
from tests.support import ROOT

TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"{i}+1=?",
        "completions": [str(i + 1), f"about {i}", "?" * (i + 1)],
        "scores": [1.0, 0.25 * i, -0.5],
        "answer": str(i + 1),
    }
    for i in range(6)
]
ONE = {"prompt": "1+1=?", "completions": ["2", "3"], "scores": [1, 0]}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: Any = TOKENIZER, limit: int = 64, **settings: Any) -> ScoredSet:
    scored = ScoredConfig(**settings.pop("scored", {}))
    settings = {"train": str(path), "completions": "dataset", "scored": scored, **settings}
    cfg = TaskConfig(**settings)
    prompts = load_prompts(cfg, tokenizer, split="train")
    return load_scored(prompts, cfg, tokenizer, max_completion_length=limit)


def of(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> ScoredSet:
    return load(jsonl(tmp_path / "data.jsonl", list(rows)), **settings)


def message(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(TaskError) as caught:
        of(tmp_path, *rows, **settings)
    return str(caught.value)


def contents(scored: ScoredSet) -> list[Any]:
    return [
        (
            prompt.token_ids,
            [(s.token_ids, s.text, s.finish_reason, s.source_id) for s in group.group.samples],
            group.scores.reward_B.tolist(),
        )
        for prompt in scored.prompts
        for group in [scored[prompt.id]]
    ]


def texts(scored: ScoredSet, row: int = 0) -> list[str]:
    return [sample.text for sample in scored[scored.prompts[row].id].group.samples]


def rewards(scored: ScoredSet, row: int = 0) -> list[float]:
    return scored[scored.prompts[row].id].scores.reward_B.tolist()


# Sources


def write_parquet(folder: Path) -> tuple[Path, dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "data.parquet")
    return folder / "data.parquet", {}


def write_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"dev": whole, "other": whole.select([0])}).save_to_disk(folder / "data")
    return folder / "data", {"split": "dev"}


@pytest.mark.parametrize("write", [write_parquet, write_folder])
def test_all_forms_of_the_same_rows_are_the_same_groups(tmp_path, write):
    path, params = write(tmp_path)
    assert contents(load(path, params=params)) == contents(of(tmp_path, *ROWS))


def test_a_completion_is_what_the_policy_would_have_drawn(tmp_path):
    scored = of(tmp_path, *ROWS)
    for row, (prompt, samples, reward) in zip(ROWS, contents(scored), strict=True):
        assert prompt == tuple(TOKENIZER(row["prompt"])["input_ids"])
        for text, sample in zip(row["completions"], samples, strict=True):
            assert sample == ((*TOKENIZER(text)["input_ids"], EOS), text, "stop", 1)
        assert reward == row["scores"]
    for prompt in scored.prompts:
        for sample in scored[prompt.id].group.samples:
            assert sample.logp == (0.0,) * len(sample.token_ids) and sample.spans == ()


def test_a_digest_of_the_prompts_covers_completions_and_scores(tmp_path):
    other = [{**row, "scores": [*row["scores"][:2], -0.75]} for row in ROWS]
    assert of(tmp_path, *ROWS).prompts.digest != of(tmp_path, *other).prompts.digest
    singles = [{"prompt": "q", "completion": c, "score": s} for c, s in (("a", 1), ("b", 2))]
    changed = [singles[0], {**singles[1], "score": 3}]
    assert of(tmp_path, *singles).prompts.digest != of(tmp_path, *changed).prompts.digest


def test_an_end_of_sequence_that_is_spelled_out_comes_once(tmp_path):
    row = {**ONE, "completions": ["2<eos>", "3"]}
    (_, samples, _), *_ = contents(of(tmp_path, row))
    assert [ids[-2:].count(EOS) for ids, *_ in samples] == [1, 1]


def test_a_beginning_of_sequence_is_the_prompts_alone(tmp_path):
    tokenizer = build_tokenizer()
    begin = tokenizer.pad_token_id
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", begin)]
    )
    (prompt, samples, _), *_ = contents(of(tmp_path, ONE, tokenizer=tokenizer))
    assert prompt == (begin, *TOKENIZER("1+1=?")["input_ids"])
    assert samples[0][0] == (*TOKENIZER("2")["input_ids"], EOS)


# Chat

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "1+1=?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("prompt", "completions"),
    [
        ("1+1=?", ["2", "3"]),
        ([USER], [[said("2")], [said("3")]]),
        ("1+1=?", [[USER, said("2")], [USER, said("3")]]),
        ([USER], [[USER, said("2")], "3"]),
    ],
)
def test_strings_turns_and_whole_conversations_are_the_same_tokens(tmp_path, prompt, completions):
    row = {**ONE, "prompt": prompt, "completions": completions}
    scored = of(tmp_path, row, chat_template=TEMPLATE)
    group = scored[scored.prompts[0].id].group
    spelled = [group.prompt.token_ids + sample.token_ids for sample in group.samples]
    assert [TOKENIZER.decode(ids) for ids in spelled] == [
        f"[user]1+1=?[assistant]{text}<eos>" for text in "23"
    ]


@pytest.mark.parametrize("turns", [[USER], [said("a"), said("b")], [{**USER, "content": "x"}], []])
def test_turns_that_are_no_answer_to_the_prompt_are_refused(tmp_path, turns):
    text = message(tmp_path, {**ONE, "prompt": [USER], "completions": [turns, "3"]})
    assert "completion 0 has turns of" in text and "data/0" in text


# Shapes


def test_a_preference_has_the_scores_that_make_it_ipo(tmp_path):
    plain = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    scored = of(tmp_path, plain, {**plain, "prompt": "r", "margin": 3})
    assert texts(scored) == ["good", "bad"]
    assert [rewards(scored, row) for row in (0, 1)] == [[0.25, -0.25], [1.5, -1.5]]


def test_a_pair_has_the_score_of_each(tmp_path):
    scored = of(tmp_path, {"prompt": "q", "y1": "a", "y2": "b", "r1": -2, "r2": 0.5})
    assert (texts(scored), rewards(scored)) == (["a", "b"], [-2.0, 0.5])


def test_single_completions_are_grouped_by_their_prompt(tmp_path):
    rows = [
        {"prompt": prompt, "completion": text, "score": score, "source": source}
        for prompt, text, score, source in [
            ("q", "a", 1, "human"),
            ("r", "b", 2, "model"),
            ("q", "c", 3, "model"),
            ("r", "d", 4, "human"),
            ("q", "e", 5, None),
        ]
    ]
    scored = of(tmp_path, *rows)
    assert [p.id for p in scored.prompts] == ["data/0", "data/1"]
    assert [texts(scored, row) for row in (0, 1)] == [["a", "c", "e"], ["b", "d"]]
    assert [rewards(scored, row) for row in (0, 1)] == [[1, 3, 5], [2, 4]]
    names = [scored.sources[s.source_id - 1] for s in scored["data/0"].group.samples]
    assert names == ["human", "model", ""]


def test_ids_of_the_data_are_taken_as_they_are(tmp_path):
    row = {
        "prompt": "q",
        "prompt_ids": [9, 8, 7],
        "completion_ids": [[10, 11], [12, EOS]],
        "scores": [1, 0],
    }
    (prompt, samples, _), *_ = contents(of(tmp_path, row))
    assert prompt == (9, 8, 7)
    assert [ids for ids, *_ in samples] == [(10, 11), (12, EOS)]
    assert [text for _, text, *_ in samples] == [TOKENIZER.decode([10, 11]), TOKENIZER.decode([12])]


def test_a_weight_goes_with_the_group(tmp_path):
    scored = of(tmp_path, {**ONE, "weights": 2.5}, {**ONE, "prompt": "q"})
    assert [scored[p.id].group.weight for p in scored.prompts] == [2.5, 1.0]


# What leaves a group


def test_equal_completions_are_merged_and_their_scores_averaged(tmp_path, caplog):
    row = {"prompt": "q", "completions": ["a", "b", "a", "a"], "scores": [1, 5, 2, 6]}
    scored = of(tmp_path, row)
    assert (texts(scored), rewards(scored)) == (["a", "b"], [3, 5])
    assert "2 completions equal another one" in caplog.text
    apart = of(tmp_path, row, scored={"dedup": False})
    assert (texts(apart), rewards(apart)) == (["a", "b", "a", "a"], [1, 5, 2, 6])


def test_truncated_completions_leave_their_group_or_train_without_an_end(tmp_path, caplog):
    row = {**ONE, "completions": ["2", "3", "4"], "scores": [1, 0, 2]}
    row |= {"truncated": [False, True, None]}
    scored = of(tmp_path, row)
    assert (texts(scored), rewards(scored)) == (["2", "4"], [1, 2])
    assert [sample.index for sample in scored["data/0"].group.samples] == [0, 2]
    assert "1 truncated completions left" in caplog.text
    (_, samples, _), *_ = contents(of(tmp_path, row, scored={"truncated": "keep"}))
    assert [(ids[-1] == EOS, why) for ids, _, why, _ in samples] == [
        (True, "stop"),
        (False, "length"),
        (True, "stop"),
    ]


def test_completions_beyond_the_limit_leave_their_group_or_break_their_row(tmp_path, caplog):
    row = {**ONE, "completions": ["2", "3", "x" * 20], "scores": [1, 0, 2]}
    assert texts(of(tmp_path, row, limit=20)) == ["2", "3"]  # the end makes it 21
    assert "1 completions left" in caplog.text and "max_completion_length = 20" in caplog.text
    assert len(texts(of(tmp_path, row, limit=21))) == 3
    text = message(tmp_path, row, limit=20, scored={"truncated": "keep"})
    assert "completion 2 has 21 tokens" in text and "task.scored.truncated=mask" in text


def test_a_prompt_whose_completions_all_left_is_no_prompt(tmp_path, caplog):
    rows = [{**ONE, "truncated": [True, True]}, {**ONE, "prompt": "q"}]
    assert [p.id for p in of(tmp_path, *rows).prompts] == ["data/1"]
    assert "1 prompts have no completion left" in caplog.text
    assert "task.scored.truncated=keep" in message(tmp_path, rows[0])


def test_one_completion_a_prompt_is_an_error_for_all_and_a_warning_for_some(tmp_path, caplog):
    single = {"prompt": "q", "completions": ["a"], "scores": [1]}
    twins = {"prompt": "r", "completions": ["a", "a"], "scores": [1, 2]}
    text = message(tmp_path, single, twins)
    for part in ("at least 2", "2 prompts has 1", "data/0", "task.completions=mixed"):
        assert part in text
    assert len(of(tmp_path, single, ONE, twins).prompts) == 3
    assert "2 of 3 prompts have only 1 completion" in caplog.text
    assert len(of(tmp_path, single, completions="mixed").prompts) == 1


# Scores


def test_standardised_scores_are_one_function_of_all_scores(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    plain, scored = of(tmp_path, *ROWS), of(tmp_path, *ROWS, scored=STANDARD)
    given = torch.tensor([s for row in ROWS for s in row["scores"]], dtype=torch.float64)
    found = torch.cat([scored[p.id].scores.reward_B for p in scored.prompts]).double()
    mean, deviation = given.mean(), given.var(correction=0).sqrt()
    torch.testing.assert_close(found, (given - mean) / deviation, rtol=1e-6, atol=1e-6)
    in_group = [float(scored[p.id].scores.reward_B.mean()) for p in scored.prompts]
    assert max(in_group) - min(in_group) > 0.1  # not of the group
    assert rewards(plain) == ROWS[0]["scores"]
    assert torch.equal(
        scored["data/0"].scores.acc_B, torch.tensor(ROWS[0]["scores"])
    )  # as the data has them


STANDARD = {"score_transform": "standardize"}


def test_clipped_scores(tmp_path):
    clip = {"score_transform": "clip", "score_min": -0.25, "score_max": 0.5}
    assert rewards(of(tmp_path, ROWS[1], scored=clip)) == [0.5, 0.25, -0.25]
    half = {"score_transform": "clip", "score_max": 0.5}
    assert rewards(of(tmp_path, ROWS[1], scored=half)) == [0.5, 0.25, -0.5]


@pytest.mark.parametrize(
    ("scored", "part"),
    [
        ({"score_transform": "group"}, "changes the optimum"),
        ({"score_transform": "per_group"}, "standardize (of the whole data set)"),
        ({"score_transform": "clip"}, "set task.scored.score_min"),
        ({"score_transform": "clip", "score_min": 2.0, "score_max": 1.0}, "2 .. 1"),
    ],
)
def test_transforms_that_are_refused(tmp_path, scored, part):
    assert part in message(tmp_path, ONE, scored=scored)


def test_equal_scores_have_no_standard(tmp_path):
    assert "all 2 scores are 3" in message(tmp_path, {**ONE, "scores": [3, 3]}, scored=STANDARD)


# Broken rows

BROKEN = [
    ({"prompt": "q", "id": "x17", "text": "a"}, "id, text", "task.params.columns.scores"),
    ({"prompt": "q", "completions": ["a", "b"]}, "no scores", "completions and scores"),
    ({**ONE, "completions": []}, "an empty list", "completions and scores"),
    ({**ONE, "scores": [1]}, "2 completions, 1 scores", "one entry a completion"),
    ({**ONE, "truncated": [True]}, "2 completions, 1 truncated", "one entry a completion"),
    ({**ONE, "scores": [1, math.nan]}, "found 1 non-finite, the first scores[1] = nan", "drop"),
    ({**ONE, "scores": [-math.inf, math.nan]}, "found 2 non-finite", "no number"),
    ({**ONE, "scores": [1, 1e39]}, "scores[1] = 1e+39", "drop"),
    ({**ONE, "scores": [1, "high"]}, "scores[1] is 'high'", "correct the rows"),
    ({**ONE, "scores": 1}, "scores is int", "correct the rows"),
    ({**ONE, "completions": "23"}, "completions is str", "correct the rows"),
    ({**ONE, "completions": ["2", 3]}, "completion 1 is int", "correct the rows"),
    ({**ONE, "completions": ["2", "\ud83d"]}, "completion 1 is no text", "correct the rows"),
    ({**ONE, "truncated": [False, "no"]}, "truncated[1] is 'no'", "correct the rows"),
    ({**ONE, "ref_logps": [-1, -math.inf]}, "assigns -inf to completion 1", "drop"),
    ({**ONE, "ref_logps": [0.1, -1]}, "assigns 0.1 to completion 0", "drop"),
    ({**ONE, "weights": -1}, "weights is -1", "correct the rows"),
    ({**ONE, "completion_ids": [[5], [262]]}, "token id 262", "another tokenizer"),
    ({**ONE, "prompt_ids": [-1]}, "token id -1", "another tokenizer"),
    ({**ONE, "prompt_ids": []}, "prompt_ids is []", "correct the rows"),
    ({**ONE, "prompt_ids": [9] * 30}, "30 prompt_ids", "task.max_prompt_length"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.inf}, "margin[0] = inf", ""),
]


@pytest.mark.parametrize(("row", "value", "fix"), BROKEN, ids=lambda part: str(part)[:40])
def test_a_broken_row_is_named_with_its_value_and_the_fix(tmp_path, row, value, fix):
    text = message(tmp_path, ONE, {"id": "x17", **row}, max_prompt_length=20)
    for part in ("data.jsonl: 1 of 2 rows", "data/1 (id 'x17')", value, fix):
        assert part in text, text
    left = of(tmp_path, ONE, row, max_prompt_length=20, on_bad_row="skip")
    assert [prompt.id for prompt in left.prompts] == ["data/0"]


def test_an_empty_completion_is_its_end_alone_and_nothing_where_it_was_cut(tmp_path):
    (_, samples, _), *_ = contents(of(tmp_path, {**ONE, "completions": ["", "3"]}))
    assert samples[0][0] == (EOS,)
    row = {**ONE, "completions": ["", "3"], "truncated": [True, False]}
    assert "completion 0 has no tokens" in message(tmp_path, row, scored={"truncated": "keep"})


def test_the_example_of_the_docs_is_read_as_they_say(tmp_path):
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    [line] = [line for line in lines if line.startswith('{"prompt"') and "scores" in line]
    (tmp_path / "data.jsonl").write_text(line + "\n")
    scored = load(tmp_path / "data.jsonl")
    assert (texts(scored), rewards(scored)) == (["A.", "B."], pytest.approx([0.71, -0.2]))
    assert scored.sources == ("human", "old-policy")


def test_a_mixed_run_that_scores_everything_needs_no_scores(tmp_path):
    row = {"prompt": "q", "completions": ["a"]}
    scored = of(tmp_path, row, completions="mixed")
    assert math.isnan(rewards(scored)[0])
    text = message(tmp_path, row, completions="mixed", scored={"rescore": False})
    assert "no scores" in text


def test_ten_thousand_groups_load_in_seconds(tmp_path):
    rows = [{**ONE, "prompt": f"{i}+1=?", "completions": [f"{i}", "x" * 50]} for i in range(10_000)]
    path = jsonl(tmp_path / "data.jsonl", rows)
    start = time.process_time()
    assert len(load(path).prompts) == 10_000
    assert time.process_time() - start < 15
