"""`rlalign decode reflect`: one record for each problem, and nothing lost on bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from typing import Any

import pytest
import torch

import rlalign.testtime.reflect_sudoku as reflect_sudoku
from rlalign import cli
from rlalign.models.sudoku_model import load_sudoku_model
from rlalign.tasks.sudoku import SudokuVerifier, make_puzzle, parse_puzzle, render
from rlalign.testtime import DecodeError, best_of, decode_reflect
from rlalign.testtime.domain import open_domain
from tests.support import ROOT
from tests.testtime.rules import RulesModel

GOOD = '{"puzzle": "12.. 3... .... ...1", "id": "mine"}'
BAD = ["{", '{"puzzle": "12"}', "[1]", '{"pzzle": ""}', '{"puzzle": "11.............."}']


@pytest.fixture(autouse=True)
def untrained(monkeypatch, request):
    if "slow" not in request.keywords:
        monkeypatch.setattr(reflect_sudoku, "load_sudoku_model", lambda **_: RulesModel())


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rlalign", "decode", "reflect", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_records_tell_what_the_verifier_says_of_what_they_show():
    seen = []
    summary = decode_reflect("sudoku", ["steps=1"], num=6, blanks=12, on_record=seen.append)
    assert seen == summary.records and len(seen) == 6
    for index, record in enumerate(seen):
        verifier = SudokuVerifier(make_puzzle(index, 12))
        for text, rating in (("draft", "before"), ("result", "after")):
            symbols = record[text].replace(" ", "")
            row = torch.tensor([["1234".index(symbol) for symbol in symbols]])
            verdict = verifier.judge(row)
            assert record[rating]["score"] == pytest.approx(float(verdict.score_B[0]))
            assert record[rating]["hard"] == float(verdict.hard_B[0])
        assert record["is_safe"] == (record["after"]["hard"] == 1)
        assert len(record["edits"]) == record["iterations"]
        for edit in record["edits"]:
            assert edit["old"] in "1234" and edit["new"] in "1234" and edit["moved_score"] is None
    before = sum(record["before"]["hard"] for record in seen) / 6
    after = sum(record["after"]["hard"] for record in seen) / 6
    assert after > before
    assert ("hard, mean", f"{before:.3f} -> {after:.3f}") in summary.rows()
    assert all(record["alone"] == record["before"] for record in seen)  # one draft, the greedy one
    score = sum(record["alone"]["score"] for record in seen) / 6
    assert ("score of the greedy sequence, mean", f"{score:.3f}") in summary.rows()
    assert seen == decode_reflect("sudoku", ["steps=1"], num=6, blanks=12).records
    assert seen != decode_reflect("sudoku", ["steps=1", "seed=1"], num=6, blanks=12).records


def test_the_command_prints_a_line_each_and_the_table_beside_it(capsys, monkeypatch):
    status, out, err = run(
        capsys, monkeypatch, "sudoku", "max_iters=2", "--num", "3", "--blanks", "8", "--steps", "1"
    )
    assert status == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 3 and all(record["iterations"] <= 2 for record in records)
    assert records == json.loads(
        json.dumps(decode_reflect("sudoku", ["steps=1", "max_iters=2"], num=3, blanks=8).records)
    )
    assert "scorer_calls, mean" in err and "stopped" in err


def test_a_page_holds_every_item_and_loads_nothing(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "new" / "out"
    file = tmp_path / "in.jsonl"
    file.write_text(GOOD.replace("mine", "<script>alert(1)</script>") + "\n" + GOOD + "\n")
    status, out, err = run(
        capsys, monkeypatch, "sudoku", "--input", str(file), "--out", str(folder), "--steps", "1"
    )
    assert status == 0 and not out and "index.html" in err
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["<script>alert(1)</script>", "mine"]
    page = (folder / "index.html").read_text()
    assert page.count("<article") == 2 and page.count('class="grid"') == 4
    assert "<script" not in page and "http:" not in page and "https:" not in page
    assert "prefers-color-scheme: dark" in page and "__" not in page
    given = page.count('class="given"') + page.count('class="given bad"')
    assert given == 4 * 4  # four givens of two grids, before and after
    again = run(capsys, monkeypatch, "sudoku", "--out", str(folder), "--num", "1")
    assert again[0] == 1 and "choose another folder" in again[2] and "--resume" in again[2]
    assert (folder / "index.html").read_text() == page


@pytest.mark.parametrize("bad", BAD)
def test_a_line_that_cannot_be_used_is_named_before_anything_is_decoded(
    bad, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "in.jsonl"
    file.write_text(f"{GOOD}\n\n{bad}\n{GOOD}\n")
    folder = tmp_path / "out"
    arguments = ("sudoku", "--input", str(file), "--out", str(folder))
    status, out, err = run(capsys, monkeypatch, *arguments)
    assert status == 1 and not out and not folder.exists()
    assert f"{file}, line 3" in err and "--skip-bad" in err and "Traceback" not in err
    status, _, err = run(capsys, monkeypatch, *arguments, "--skip-bad")
    assert status == 0 and "skipped: " in err and "line 3" in err
    assert len((folder / "results.jsonl").read_text().splitlines()) == 2


def test_stdin_is_read_and_num_takes_the_first(monkeypatch):
    lines = "\n".join(GOOD.replace("mine", str(i)) for i in range(5)).encode()

    class Stdin:
        buffer = io.BytesIO(lines)

    monkeypatch.setattr(sys, "stdin", Stdin)
    summary = decode_reflect("sudoku", source="-", num=3)
    assert [record["id"] for record in summary.records] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("chess",), ["chess", "sudoku, driving"]),
        (("sudoku", "--oracle", "cv"), ["oracle", "blanks, drafts"]),
        (("sudoku", "stepps=2"), ["stepps", "steps"]),
        (("sudoku", "--steps", "0"), ["steps", "0"]),
        (("sudoku", "--blanks", "20"), ["0 to 16"]),
        (("sudoku", "--num", "0"), ["at least 1"]),
        (("sudoku", "--drafts", "0"), ["drafts=0", "at least 1"]),
        (("sudoku", "--drafts", "-1"), ["drafts=-1", "at least 1"]),
        (("sudoku", "seed=-1"), ["seed", "-1"]),
        (("sudoku", "seed=2147483648"), ["seed", "2147483647"]),
        (("sudoku", "--blanks", "3", "--input", "x.jsonl"), ["leave out blanks or input"]),
        (("sudoku", "--input", "nowhere.jsonl"), ["nowhere.jsonl", "is not a file"]),
    ],
)
def test_wrong_settings_name_cause_and_fix(arguments, parts, tmp_path, capsys, monkeypatch):
    status, out, err = run(capsys, monkeypatch, *arguments, "--out", str(tmp_path / "out"))
    assert status == 1 and not out and "Traceback" not in err
    assert all(part in err for part in parts), err
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_usable_line_is_an_error_even_when_bad_ones_are_skipped(tmp_path):
    (tmp_path / "in.jsonl").write_text("{\n")
    with pytest.raises(DecodeError, match=r"no problem that can be used.*1 lines skipped"):
        decode_reflect("sudoku", source=tmp_path / "in.jsonl", skip_bad=True)


def test_what_was_written_before_a_verifier_failed_is_kept(tmp_path):
    domain = open_domain("sudoku", ["steps=1"], {"blanks": 8})
    calls = []

    class Failing(SudokuVerifier):
        def judge(self, ids_BT):
            calls.append(len(ids_BT))
            raise RuntimeError("the grader died")

    def make(index, own=domain.make):
        item = own(index)
        if index < 16:
            return item
        broken = Failing(item.source)
        return dataclasses.replace(item, problem=dataclasses.replace(item.problem, verifier=broken))

    domain.make = make
    with pytest.raises(RuntimeError, match="the grader died"):
        decode_reflect(domain, num=20, out=tmp_path / "out")
    file = tmp_path / "out" / "results.jsonl"
    assert calls and len(file.read_text().splitlines()) == 16
    assert (tmp_path / "out" / "index.html").read_text().count("<article") == 16
    with file.open("a") as lines:
        lines.write('{"id": "cut')
    domain = open_domain("sudoku", ["steps=1"], {"blanks": 8})
    new, progress = [], []
    summary = decode_reflect(
        domain,
        num=20,
        out=tmp_path / "out",
        resume=True,
        on_record=new.append,
        on_progress=lambda *numbers: progress.append(numbers),
    )
    assert new == summary.records[16:] and len(new) == 4 and progress[-1] == (20, 20)
    whole = decode_reflect("sudoku", ["steps=1"], num=20, blanks=8).records
    assert [json.loads(line) for line in file.read_text().splitlines()] == whole
    assert (tmp_path / "out" / "index.html").read_text().count("<article") == 20
    file.write_text('{"id": 1}\n')
    with pytest.raises(DecodeError, match="line 1 is no result"):
        decode_reflect(domain, num=1, out=tmp_path / "out", resume=True)
    with pytest.raises(DecodeError, match="give out"):
        decode_reflect(domain, num=1, resume=True)


def test_an_interrupted_run_leaves_its_page_and_items_are_made_as_they_are_needed(tmp_path):
    domain = open_domain("sudoku", ["steps=1"], {"blanks": 8})
    made = []
    domain.make = lambda index, own=domain.make: made.append(index) or own(index)

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_reflect(domain, num=60, out=tmp_path, on_record=interrupt)
    assert len(made) == 16 and (tmp_path / "index.html").read_text().count("<article") == 1


def test_of_problems_with_the_same_id_none_is_lost_on_resuming(tmp_path):
    (tmp_path / "one.jsonl").write_text(GOOD + "\n")
    (tmp_path / "two.jsonl").write_text(GOOD + "\n" + GOOD + "\n")
    decode_reflect("sudoku", source=tmp_path / "one.jsonl", out=tmp_path / "out")
    options = {"out": tmp_path / "out", "resume": True}
    summary = decode_reflect("sudoku", source=tmp_path / "two.jsonl", **options)
    assert [record["id"] for record in summary.records] == ["mine", "mine"]


def test_any_puzzle_comes_out_with_its_givens(tmp_path):
    puzzle = parse_puzzle("12.. 3... .... ...1")
    (tmp_path / "in.jsonl").write_text(GOOD)
    [record] = decode_reflect("sudoku", source=tmp_path / "in.jsonl").records
    for text in (record["draft"], record["result"]):
        digits = ["1234".index(symbol) for symbol in text.replace(" ", "")]
        assert all(d == g for d, g in zip(digits, puzzle.tolist(), strict=True) if g != 4)


def test_the_example_of_the_page_runs(monkeypatch, capsys):
    monkeypatch.setattr("rlalign.models.sudoku_model.load_sudoku_model", lambda: RulesModel())
    text = (ROOT / "docs" / "reflection.md").read_text()
    variables: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], variables)
    result = variables["result"]
    assert result.is_safe and variables["control"].after.order <= result.after.order
    assert capsys.readouterr().out.startswith(render(result.ids_T))


@pytest.mark.slow
def test_the_trained_model_s_puzzles_are_repaired(tmp_path, monkeypatch):
    """12 blanks in 2 steps: about a fifth is right at first, nearly all is after repairs, and as
    many forward passes spent on samples give about half. One blank is filled right at once."""
    quiet = lambda stage, done, total: None  # noqa: E731
    model = load_sudoku_model(0, cache_dir=tmp_path, progress=quiet)
    monkeypatch.setattr(reflect_sudoku, "load_sudoku_model", lambda **_: model)
    domain = open_domain("sudoku")
    problems = [domain.make(index).problem for index in range(100)]
    results = domain.reflector.run_many(problems)
    before = sum(result.before.hard for result in results) / 100
    after = sum(result.after.hard for result in results) / 100
    rows = [result.row_forwards for result in results]
    samples = best_of(model, problems, rows, config=domain.reflector.config)
    control = sum(result.after.hard for result in samples) / 100
    assert before <= 0.45 and after >= 0.9 and after >= control + 0.2
    assert sum(result.iterations for result in results) / 100 <= 2
    forced = decode_reflect("sudoku", ["max_iters=0"], num=88, blanks=1).records
    assert sum(record["before"]["hard"] for record in forced) >= 86
