"""`rlalign decode METHOD`: a record for each row, nothing lost, nothing done twice."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rlalign import cli
from rlalign.config.load import ConfigError
from rlalign.models.random import write_random_model
from rlalign.rewards.verdict import RewardError
from rlalign.tasks.mini import get_mini_task
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.decode_rows import dump, parse_shard, read_rows
from rlalign.testtime.decode_summary import Summary
from rlalign.testtime.decode_text import Progress, TextJob, decode_text
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.majority import majority
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.rewards import FunctionReward
from tests.testtime.search_fakes import ScriptedEngine

SMALL = {"small": "b", "experts": ["c"]}
BAD = ["{broken", '{"nothing": 1}', '{"prompt": "\\ud800"}', '{"prompt": []}', "[1]"]


def echo(prompt: str, seed: int, temperature: float) -> str:
    return f"<answer>{prompt}</answer>"


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": str(i), "answer": str(i % 2)} for i in range(count)]


@pytest.fixture
def job(tmp_path):
    source = write(tmp_path / "in.jsonl", rows_of(6))

    def make(method="majority", engine=None, options=("num_samples=2",), **given) -> TextJob:
        given = {"source": source, "out": tmp_path / "out.jsonl"} | given
        engine = engine or ScriptedEngine(echo)
        return TextJob(method, engine, overrides=options, **given)

    return make


def test_records_are_those_of_the_python_function_with_columns_of_the_row(tmp_path, job):
    rows = get_mini_task("chain").make_rows("eval")[:6]
    source, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "deep" / "out.jsonl"
    engine = open_engine("mini:chain")
    options = {"num_samples": 3, "max_new_tokens": 40}
    given = ["num_samples=3", "max_new_tokens=40"]
    summary = decode_text(job(engine=engine, source=source, out=out, options=given))
    results = majority(engine, rows, **options)
    records = {record["id"]: record for record in read(out)}
    assert len(records) == 6
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        record = records[str(index)]
        expected = json.loads(json.dumps(result.to_json())) | {"wall_s": record["wall_s"]}
        assert {name: record[name] for name in expected} == expected
        assert record["method"] == "majority" and record["prompt"] == row["prompt"]
        assert record["answer"] == row["answer"]
        assert record["right"] == (f"<answer>{row['answer']}</answer>" in result.text)
    right = [record["right"] for record in records.values()]
    assert summary.accuracy == sum(right) / 6 and any(right)


def test_a_bad_row_gives_a_record_and_the_others_their_own(tmp_path, job):
    lines = [*rows_of(2), *BAD, {"prompt": "y" * 300, "id": "long"}, {"prompt": "7", "id": 7}]
    source = write(tmp_path / "in.jsonl", lines)
    summary = decode_text(job(source=source))
    records = {record["id"]: record for record in read(tmp_path / "out.jsonl")}
    assert len(records) == len(lines)
    failed = {name for name, record in records.items() if record["error"]}
    assert failed == {"2", "3", "4", "5", "6", "long"}
    for name in failed:
        assert records[name]["text"] == "" and records[name]["stop_reason"] == "error"
    assert "line 3: not JSON" in records["2"]["error"]
    assert records["7"]["text"] == "<answer>7</answer>" and "right" not in records["7"]
    assert ("errors", "6") in summary.rows()


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_interrupt_loses_nothing_and_resume_does_the_rest_only(stop_at, tmp_path, job):
    whole = tmp_path / "whole.jsonl"
    decode_text(job(out=whole))
    done = 0

    def interrupt(record):
        nonlocal done
        done += 1
        if done > stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_text(job(in_flight=1), on_record=interrupt)
    out = tmp_path / "out.jsonl"
    assert len(read(out)) == stop_at + 1
    before = out.read_text()
    out.write_text(before + '{"id": "5", "cut off')
    engine = ScriptedEngine(echo)
    reached: list[int] = []
    summary = decode_text(
        job(engine=engine, resume=True, in_flight=1), on_progress=lambda p: reached.append(p.done)
    )
    assert out.read_text().startswith(before)
    assert sum(len(requests) for requests in engine.rounds) == 2 * (6 - stop_at - 1)
    assert reached[-1] == 6 and reached[0] == stop_at + 1
    assert summary.num_held == stop_at + 1 and ("made before", str(stop_at + 1)) in summary.rows()

    def content(path):
        return sorted(json.dumps(record | {"wall_s": 0}) for record in read(path))

    assert content(out) == content(whole)
    again = out.read_bytes()
    decode_text(job(engine="no/such-model", resume=True))  # nothing is left: it is not opened
    assert out.read_bytes() == again


def test_resume_makes_errors_anew_and_tells_rows_of_one_id_apart(tmp_path, job):
    rows = [{"prompt": p, "id": "x"} for p in ("a", "b", "y" * 300, "a")]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    decode_text(job(source=source))
    whole = read(out)
    assert [bool(record["error"]) for record in whole] == [True, False, False, False]
    write(out, [record for record in whole if record["prompt"] != "a"])
    decode_text(job(source=source, resume=True))
    prompts = [record["prompt"] for record in read(out)]
    assert prompts == ["b", "y" * 300, "a", "a"]


def test_resume_with_other_prompts_skips_none_of_them(tmp_path, job):
    decode_text(job())
    other = write(tmp_path / "other.jsonl", [{"prompt": f"new {i}"} for i in range(3)])
    decode_text(job(source=other, resume=True))
    assert len(read(tmp_path / "out.jsonl")) == 9


def test_what_is_there_is_not_overwritten(tmp_path, job):
    out = tmp_path / "out.jsonl"
    decode_text(job())
    before = out.read_bytes()
    with pytest.raises(DecodeError, match="--resume"):
        decode_text(job())
    with pytest.raises(DecodeError, match="records of majority, not of best-of-n"):
        decode_text(job("best-of-n", reward="length", resume=True))
    assert out.read_bytes() == before
    write(out, [{"id": "0"}])
    with pytest.raises(DecodeError, match="no record"):
        decode_text(job(resume=True))


@pytest.mark.parametrize("num", [None, 1, 5, 11])
@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shards_have_nothing_in_common_and_are_all(num, of, tmp_path):
    source = write(tmp_path / "in.jsonl", rows_of(11))
    shards = [[row.id for row in read_rows(source, num, f"{i + 1}/{of}")] for i in range(of)]
    assert [name for shard in shards for name in shard] == [str(i) for i in range(num or 11)]
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/", "-1/2", "1/2/3", "1.0/2"])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(DecodeError, match="1/4"):
        parse_shard(shard)


def test_a_reward_is_given_the_answer_under_any_of_its_names_and_may_miss_it(tmp_path, job):
    rows = [
        {"question": "1", "ground_truth": "1"},
        {"prompt": "2", "solution": "3", "other": 1},
        {"prompt": "3"},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    given = {"source": source, "reward": "exact_match", "in_flight": 1}
    summary = decode_text(job("best-of-n", **given))
    records = read(tmp_path / "out.jsonl")
    assert [record["reward"] for record in records] == [1.0, 0.0, None]
    assert [record.get("right") for record in records] == [True, False, None]
    assert all(record["counters"]["oracle"] == 1 for record in records)
    names = [name for name, _ in summary.rows()]
    assert "accuracy, by a reward that knows the answer" in names


def has_other(prompts, completions, other):
    return [None if value is None else float(value) for value in other]


def test_rows_that_lack_a_column_of_the_reward_have_no_score(tmp_path, job):
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "2", "other": 3}, {"prompt": "3"}]
    source = write(tmp_path / "in.jsonl", rows)
    decode_text(job("best-of-n", source=source, reward=has_other, in_flight=1))
    assert [record["reward"] for record in read(tmp_path / "out.jsonl")] == [None, 3.0, None]


def test_a_record_is_in_the_file_when_it_is_told_of(tmp_path, job):
    seen = []

    def look(record):
        lines = read(tmp_path / "out.jsonl")
        seen.append((len(lines), lines[-1]["id"] == record["id"]))

    decode_text(job(), on_record=look)
    assert seen == [(i + 1, True) for i in range(6)]


def test_what_failed_is_not_right_whatever_is_asked_for(tmp_path, job):
    source = write(tmp_path / "in.jsonl", [{"prompt": [], "answer": ""}])
    summary = decode_text(job(source=source, extract="pattern:(.*)"))
    assert summary.accuracy == 0.0


@pytest.mark.parametrize("method", ["best-of-n", "majority", "latent-seek", "rain"])
@pytest.mark.parametrize("part", [False, True])
def test_a_reward_that_fails_is_told_of(method, part, tmp_path, job):
    """Not taken for a low score, nor for none: in the record, in the table, by the exit status."""

    def broken(prompts, completions, **columns):
        if part and prompts[0] == "3":
            return [-0.5] * len(completions)
        raise ValueError("no such model")

    options = {"latent-seek": ["max_steps=1"], "rain": ["max_total_searches=2"]}
    given = options.get(method, ["num_samples=2"])
    model = str(write_random_model(tmp_path / "model", "qwen2", max_positions=64))
    decoded = job(method, model, [*given, "max_new_tokens=4"], reward=broken)
    summary = decode_text(dataclasses.replace(decoded, in_flight=1))
    failed = [r for r in read(tmp_path / "out.jsonl") if r["counters"].get("failed_rewards")]
    assert len(failed) == 5 if part else 6
    for record in failed:
        assert record["reward_error"].startswith("crash: ") and not record["error"]
        assert "no such model" in record["reward_error"] and record["reward"] is None
        assert record["counters"]["failed_rewards"] == record["num_reward_calls"]
    told = dict(summary.figures())["rewards that failed"]
    num = sum(record["counters"]["failed_rewards"] for record in failed)
    assert told.startswith(f"{num} of ") and told.endswith("first: ValueError: no such model")
    assert summary.nothing_came_of_it is (not part)


@pytest.mark.parametrize(
    "method, options, more, part",
    [
        ("rain", ["score_range=[1,0]"], {}, "score_range"),
        ("rain", ["embedder=/nowhere"], {}, "embedder='/nowhere'"),
        ("latent-seek", ["verifier.role_weights=[1,2]"], {}, "role_weights"),
        ("logit-fusion", ["joint=true"], {"small": "b", "experts": ["c"]}, "two experts"),
        (
            "logit-fusion",
            ["speculate=4"],
            {"small": "b", "experts": ["c"], "backend": "vllm"},
            "hf",
        ),
    ],
)
def test_options_are_looked_at_before_a_model_is_loaded(method, options, more, part, job):
    with pytest.raises(DecodeError, match=re.escape(part)):
        decode_text(job(method, "/no/such/model", options, **more))


def test_ids_of_another_vocabulary_are_the_rows_own_fault(tmp_path, job):
    source = write(tmp_path / "ids.jsonl", [{"prompt": [5, 99999], "id": "big"}, "1"])
    decode_text(job(engine=open_engine("mini:chain"), source=source, options=["max_new_tokens=4"]))
    errors = {record["id"]: record["error"] for record in read(tmp_path / "out.jsonl")}
    assert (
        "prompt 'big' has token ids from 5 to 99999" in errors["big"]
        and "tokenizer" in errors["big"]
    )


def test_options_of_the_reward_go_to_the_reward(tmp_path, job):
    options = ["num_samples=1", "reward.pattern=<answer>[0-2]</answer>", "reward.score=4"]
    decode_text(job("best-of-n", options=options, reward="regex"))
    rewards = {record["id"]: record["reward"] for record in read(tmp_path / "out.jsonl")}
    assert rewards == {"0": 4.0, "1": 4.0, "2": 4.0, "3": 0.0, "4": 0.0, "5": 0.0}
    assert "oracle" not in read(tmp_path / "out.jsonl")[0]["counters"]


def test_the_rule_for_answers_also_counts_the_votes(tmp_path, job):
    def say(prompt, seed, temperature):
        return f"<answer>1</answer> x={seed % 3}"

    decode_text(
        job(engine=ScriptedEngine(say), options=["num_samples=30"], extract="pattern:x=(.)")
    )
    for record in read(tmp_path / "out.jsonl"):
        votes = {entry["answer"]: entry["votes"] for entry in record["trace"]["answers"]}
        assert set(votes) <= {"0", "1", "2"} and len(votes) > 1 and sum(votes.values()) == 30
        assert record["right"] == (max(votes, key=votes.__getitem__) == record["answer"])


def test_a_config_file_is_read_and_options_go_over_it(tmp_path, job):
    config = tmp_path / "options.yaml"
    config.write_text("num_samples: 5\nmax_new_tokens: 4\n")
    engine = ScriptedEngine(echo)
    decode_text(job(engine=engine, options=["num_samples=3"], config=config, num=1))
    [requests] = engine.rounds
    assert len(requests) == 3
    assert {request.params.max_completion_length for request in requests} == {4}


def test_progress_counts_tokens_and_requests_while_rows_are_on_their_way(job):
    seen: list[tuple[int, int, int, int]] = []

    def note(p: Progress) -> None:
        seen.append((p.done, p.total, p.tokens, p.requests))

    decode_text(job(in_flight=3), on_progress=note)
    length = len("<answer>0</answer>") + 1
    assert seen[0] == (0, 6, 6 * length, 6)  # three rows of two samples, none ready yet
    assert seen[-1] == (6, 6, 12 * length, 12)
    assert [p[0] for p in seen] == [0, 1, 2, 3, 3, 4, 5, 6]


WRONG = [
    ({"method": "best-of-n"}, DecodeError, "by a reward: name one"),
    ({"method": "best"}, DecodeError, "majority, latent-seek"),
    ({"small": "x"}, DecodeError, "leave out small"),
    ({"method": "logit-fusion", "reward": "math"}, DecodeError, "no use for a reward"),
    ({"method": "logit-fusion"}, DecodeError, "small model and at least one expert"),
    ({"options": ["num_sample=2"]}, ConfigError, "num_samples"),
    ({"options": ["num_samples=0"]}, ConfigError, ">= 1"),
    ({"options": ["reward.pattern=x"]}, DecodeError, "no reward"),
    ({"source": "nowhere.jsonl"}, DecodeError, "nowhere.jsonl is not a file"),
    ({"num": 0}, DecodeError, "at least 1"),
    ({"in_flight": 0}, DecodeError, "in_flight=0"),
    ({"dtype": "float8"}, DecodeError, "float32, bfloat16"),
    ({"device": "tpu"}, DecodeError, "cpu or cuda"),
    ({"shard": "5/4"}, DecodeError, "I/N"),
    ({"extract": "boxx"}, DecodeError, "boxx"),
    ({"method": "best-of-n", "reward": "mathh"}, RewardError, "mathh"),
    ({"method": "best-of-n", "reward": "python_tests"}, RewardError, "tests"),
]


@pytest.mark.parametrize(("wrong", "error", "part"), WRONG)
def test_what_cannot_be_run_leaves_nothing_behind(wrong, error, part, tmp_path, job):
    engine = ScriptedEngine(echo)
    with pytest.raises(error, match=part):
        decode_text(job(engine=engine, **wrong))
    assert not engine.rounds
    out = tmp_path / "out.jsonl"
    assert not out.exists()


def test_numbers_that_json_lacks_become_null():
    record = {"trace": {"q": [float("nan"), 1.5, {"r": float("-inf")}]}, "t": (float("inf"), "NaN")}
    assert json.loads(dump(record)) == {
        "trace": {"q": [None, 1.5, {"r": None}]},
        "t": [None, "NaN"],
    }


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rlalign", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_writes_records_a_table_and_a_page(tmp_path, capsys, monkeypatch):
    rows = get_mini_task("chain").make_rows("eval")[:5]
    source, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    common = ["--model", "mini:chain", "--input", str(source), "--output", str(out)]
    options = ["--reward", "math", "num_samples=2", "max_new_tokens=40", "--shard", "1/2"]
    status, _, err = run(capsys, monkeypatch, "decode", "best-of-n", *common, *options)
    assert status == 0, err
    assert "tokens generated, a problem" in err and "accuracy" in err and "samples 2" in err
    with FunctionReward("math") as reward:
        results = best_of_n(
            open_engine("mini:chain"), rows[:2], reward, num_samples=2, max_new_tokens=40
        )
    assert [record["text"] for record in read(out)] == [result.text for result in results]
    status, _, err = run(capsys, monkeypatch, "decode", "best-of-n", *common, *options)
    assert status == 1 and "--resume" in err and "Traceback" not in err
    status, _, err = run(
        capsys, monkeypatch, "decode", "best-of-n", *common, *options[:-1], "2/2", "--resume"
    )
    assert status == 0 and len(read(out)) == 5
    status, shown, _ = run(capsys, monkeypatch, "report", str(out))
    assert status == 0 and "out.html" in shown and (tmp_path / "out.html").exists()


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(job, *, on_progress, **_):
        on_progress(Progress(9, 4))
        raise KeyboardInterrupt

    module = importlib.import_module("rlalign.testtime.decode_text")
    monkeypatch.setattr(module, "decode_text", interrupted)
    arguments = ["--model", "m", "--input", "i.jsonl", "--output", "o.jsonl"]
    status, _, err = run(capsys, monkeypatch, "decode", "rain", *arguments)
    assert status == 130 and "4 records" in err and "--resume" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "method", ["best-of-n", "majority", "latent-seek", "rain", "logit-fusion", "reflect"]
)
def test_each_method_has_help_with_an_example(method, capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "decode", method, "--help")
    assert status == 0 and f"rlalign decode {method}" in " ".join(out.split())


def test_the_commonest_error_is_told_whatever_its_names_and_numbers():
    errors = ["E: prompt 'a' has 5 tokens", "E: prompt 'b' has 7 tokens", "E: not JSON"]
    summary = Summary([{**slim_record(), "error": error} for error in errors])
    told = dict(summary.figures())["commonest error"]
    assert told == f"2 times, first: {errors[0]}"


def slim_record() -> dict[str, Any]:
    return {"stop_reason": "error", "reward": None, "counters": {}}
