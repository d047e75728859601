"""Every source gives the same prompts for the same rows; what is broken is counted and named."""

from __future__ import annotations

import json
import time

import pytest

from rlalign.config import TaskConfig
from rlalign.models.tokenizer import build_tokenizer
from rlalign.tasks import PromptSet, TaskError, load_prompts

TOKENIZER = build_tokenizer()
ROWS = [{"prompt": f"{i}+1=?", "answer": str(i + 1), "level": i % 3} for i in range(20)]


def load(spec, split="train", tokenizer=TOKENIZER, **settings) -> PromptSet:
    return load_prompts(TaskConfig(**{"train": str(spec), **settings}), tokenizer, split=split)


def message(spec, **settings) -> str:
    with pytest.raises(TaskError) as caught:
        load(spec, **settings)
    return str(caught.value)


def jsonl(path, rows, newline="\n", start=b""):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes(start + (newline.join(lines) + newline).encode())
    return path


def no_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def contents(prompts):
    return [(p.token_ids, p.source, p.answer, dict(p.columns)) for p in prompts]


# Sources


def write_jsonl(folder):
    return jsonl(folder / "data.jsonl", ROWS), {}


def write_parquet(folder):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "data.parquet")
    return folder / "data.parquet", {}


def write_folder(folder):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "data")
    return folder / "data", {}


def write_folder_with_splits(folder):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"other": whole.select([0]), "dev": whole}).save_to_disk(folder / "data")
    return folder / "data", {"split": "dev"}


WRITERS = [write_jsonl, write_parquet, write_folder, write_folder_with_splits]


@pytest.mark.parametrize("write", WRITERS)
def test_all_forms_of_the_same_rows_are_the_same_prompts(tmp_path, write):
    path, params = write(tmp_path)
    prompts = load(path, params=params)
    assert contents(prompts) == [
        (
            tuple(TOKENIZER(r["prompt"])["input_ids"]),
            r["prompt"],
            r["answer"],
            {"level": r["level"]},
        )
        for r in ROWS
    ]
    assert [p.id.rpartition("/")[2] for p in prompts] == [str(i) for i in range(20)]
    assert prompts.columns == ("answer", "level")
    assert len(load(path, params={**params, "size": 7})) == 7


def test_the_id_does_not_depend_on_the_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    here, there = (write_jsonl(folder)[0] for folder in (tmp_path, tmp_path / "elsewhere"))
    assert load(here).digest == load(there).digest
    assert load(here)[3].id == "data/3"


def test_missing_split_lists_those_there_are(tmp_path):
    path, _ = write_folder_with_splits(tmp_path)
    text = message(path)
    assert "'train'" in text and "other, dev" in text and "task.params.split" in text


def test_a_folder_that_is_no_data_set(tmp_path):
    assert "save_to_disk" in message(tmp_path)


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "x.parquet").write_text("hello")
    assert "cannot be read as Parquet" in message(tmp_path / "x.parquet")


def test_mini_task_splits_and_parameters():
    train = load("mini:chain", params={"size": 30, "seed": 3, "max_terms": 3})
    assert len(train) == 30 and train[0].id == "mini:chain:train/0"
    assert {p.columns["num_terms"] for p in train} == {2, 3}
    held = load("mini:chain", split="eval", eval="mini:chain", params={"size": 10, "max_terms": 2})
    assert [p.id for p in held][:2] == ["mini:chain:eval/0", "mini:chain:eval/1"]
    assert len(held) == 10 and {p.columns["num_terms"] for p in held} == {2}  # inherited


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("mini:chess", ["'chess'", "chain"]),
        ("nowhere.jsonl", ["nowhere.jsonl", "reasoning_gym:"]),
        ("nowhere", ["nowhere", "*.jsonl"]),
        ("no/folder/x.jsonl", ["no folder"]),
    ],
)
def test_unknown_sources_say_what_is_accepted(spec, parts):
    text = message(spec)
    assert all(part in text for part in parts), text


def test_unknown_endings_and_neighbours_are_named(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    write_jsonl(tmp_path)
    assert "'.csv'" in message(tmp_path / "data.csv")
    assert "data.jsonl" in message(tmp_path / "dat.jsonl")


def test_unknown_parameters_are_refused(tmp_path):
    path, _ = write_jsonl(tmp_path)
    assert "'splitt'" in message(path, params={"splitt": "a"})
    assert "sized" in message("mini:chain", params={"sized": 3})
    assert "size" in message(path, params={"size": 0})
    assert "columns" in message(path, params={"columns": "question"})


def test_a_hub_data_set_out_of_reach_is_an_error_within_seconds(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    text = message("no-such-owner/no-such-data")
    assert "out of reach" in text and "127.0.0.1:9" in text
    assert time.monotonic() - start < 20


def test_no_evaluation_data():
    assert "task.eval is not set" in message("mini:chain", split="eval")


def test_split_and_seed_are_not_inherited(tmp_path):
    path, _ = write_folder_with_splits(tmp_path)
    settings = {"params": {"split": "dev"}, "eval": str(path), "split": "eval"}
    assert "'test'" in message(path, **settings)  # and not the training split
    assert len(load(path, **settings, eval_params={"split": "other"})) == 1


def test_parameters_of_another_kind_of_source_are_not_inherited(tmp_path):
    path, _ = write_jsonl(tmp_path)
    held = load("mini:chain", params={"max_terms": 2}, eval=str(path), split="eval")
    assert len(held) == 20


# Columns


@pytest.mark.parametrize("name", ["answer", "solution", "ground_truth"])
def test_answer_solution_and_ground_truth_are_one_column(tmp_path, name):
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "1+1=?", name: "2"}])
    assert contents(load(path))[0][2:] == ("2", {})


def test_with_several_the_answer_wins_and_the_others_stay(tmp_path):
    row = {"prompt": "q", "solution": "long", "answer": "42", "ground_truth": None}
    (prompt,) = load(jsonl(tmp_path / "x.jsonl", [row]))
    assert prompt.answer == "42"
    assert prompt.columns == {"solution": "long", "ground_truth": None}


def test_columns_can_be_renamed(tmp_path):
    row = {"question": "1+1=?", "final": {"value": 2}, "prompt": "unused"}
    path = jsonl(tmp_path / "x.jsonl", [row])
    (prompt,) = load(path, params={"columns": {"prompt": "question", "answer": "final"}})
    assert (prompt.source, prompt.answer, dict(prompt.columns)) == ("1+1=?", {"value": 2}, {})


# Broken rows

BROKEN = [
    {"prompt": "fine"},
    {"question": "no prompt"},
    "{not json",
    '["a", "list"]',
    {"prompt": 7},
    {"prompt": "  "},
    {"prompt": "x" * 50},
    {"prompt": []},
    {"prompt": [{"role": "wizard", "content": "hi"}]},
    {"prompt": [{"role": "user", "content": None}]},
    {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    '{"prompt": "half \\ud83d"}',
    {"prompt": "also fine"},
]


def test_broken_rows_are_counted_by_kind_with_their_lines(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", BROKEN)
    prompts = load(path, on_bad_row="skip", max_prompt_length=20)
    assert [p.id for p in prompts] == ["x/0", "x/12"]
    report = prompts.report
    assert (report.num_rows, report.num_bad) == (13, 11)
    assert report.bad == {
        "missing prompt": 1,
        "malformed row": 3,
        "wrong type": 4,
        "empty prompt": 2,
        "prompt too long": 1,
    }
    assert [row.place for row in report.examples] == [f"line {n}" for n in (2, 3, 4, 5, 6)]
    assert "columns: question" in str(report) and "11 broken" in str(report)


def test_broken_rows_are_fatal_by_default_and_all_in_one_message(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", BROKEN)
    text = message(path, max_prompt_length=20)
    for part in ("2 of 13", "line 2", "task.on_bad_row=skip", "task.params.columns.prompt"):
        assert part in text
    too_long = message(jsonl(tmp_path / "y.jsonl", [{"prompt": "x" * 50}]), max_prompt_length=20)
    assert "50 tokens" in too_long and "raise task.max_prompt_length" in too_long


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", ["", '{"prompt": "a"}', "   ", "oops", ""])
    prompts = load(path, on_bad_row="skip")
    assert [p.id for p in prompts] == ["x/0"]
    assert prompts.report.examples[0].place == "line 4"


def test_a_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert "line 2" in message(path) and "UTF-8" in message(path)


@pytest.mark.parametrize("on_bad_row", ["skip", "error"])
def test_nothing_left_is_an_error(tmp_path, on_bad_row):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    assert "no rows" in message(empty, on_bad_row=on_bad_row)
    broken = jsonl(tmp_path / "broken.jsonl", ["x"])
    assert "0 of 1 rows" in message(broken, on_bad_row=on_bad_row)


def test_byte_order_mark_crlf_and_unicode(tmp_path):
    rows = [{"prompt": "naïve\u2028🙂 ½", "answer": "é"}, {"prompt": "b"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = jsonl(tmp_path / "x.jsonl", lines, newline="\r\n", start=b"\xef\xbb\xbf")
    first, second = load(path)
    assert (first.source, first.answer, second.source) == ("naïve\u2028🙂 ½", "é", "b")
    assert TOKENIZER.decode(first.token_ids) == "naïve\u2028🙂 ½"


def test_ten_thousand_rows_load_in_seconds(tmp_path):
    rows = [{"prompt": f"What is {i} plus {i}? Think first.", "answer": i} for i in range(10_000)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    start = time.process_time()
    assert len(load(path)) == 10_000
    assert time.process_time() - start < 10


# Chat templates

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
TURNS = [{"role": "user", "content": "hi"}]


def text_of(path, tokenizer=TOKENIZER, **settings) -> str:
    return tokenizer.decode(load(path, tokenizer=tokenizer, **settings)[0].token_ids)


@pytest.fixture
def string(tmp_path):
    return jsonl(tmp_path / "string.jsonl", [{"prompt": "hi"}])


@pytest.fixture
def chat(tmp_path):
    return jsonl(tmp_path / "chat.jsonl", [{"prompt": TURNS}])


def test_a_string_is_one_user_turn_where_there_is_a_template(string, chat):
    assert text_of(string, chat_template=TEMPLATE) == "[user]hi[assistant]"
    assert text_of(chat, chat_template=TEMPLATE) == "[user]hi[assistant]"
    assert text_of(string, chat_template=TEMPLATE, apply_chat_template="never") == "hi"


def test_a_string_is_bare_text_where_there_is_none(string):
    assert text_of(string, no_template()) == "hi"
    with pytest.raises(TaskError, match="apply_chat_template=always"):
        load(string, tokenizer=no_template(), apply_chat_template="always")


def test_messages_need_a_template(chat):
    for settings in ({"tokenizer": no_template()}, {"apply_chat_template": "never"}):
        with pytest.raises(TaskError, match=r"no chat template.*task\.chat_template"):
            load(chat, **settings)


def test_system_prompt_goes_first_and_replaces_one_that_is_there(tmp_path, string):
    settings = {"chat_template": TEMPLATE, "system_prompt": "be brief"}
    assert text_of(string, **settings) == "[system]be brief[user]hi[assistant]"
    turns = [{"role": "system", "content": "old"}, *TURNS]
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": turns}])
    assert text_of(path, **settings) == "[system]be brief[user]hi[assistant]"
    with pytest.raises(TaskError, match=r"task\.system_prompt needs a chat template"):
        load(string, tokenizer=no_template(), system_prompt="be brief")


def test_a_wrong_template_is_fatal_and_one_that_refuses_a_row_is_a_broken_row(tmp_path, string):
    assert "not valid Jinja" in message(string, chat_template="{% for %}", on_bad_row="skip")
    fussy = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x"
    rows = [{"prompt": TURNS}, {"prompt": [*TURNS, *TURNS]}]
    path = jsonl(tmp_path / "x.jsonl", rows)
    report = load(path, chat_template=fussy, on_bad_row="skip").report
    assert report.bad == {"chat template refused": 1}
    assert "one turn only" in str(report)


def test_bare_text_gets_the_tokenizers_own_special_tokens_and_a_template_only_its_own(string):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    begin = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", begin)]
    )
    bare = load(string, tokenizer=tokenizer, apply_chat_template="never")[0].token_ids
    templated = load(string, tokenizer=tokenizer, chat_template="{{ eos_token }}hi")[0].token_ids
    assert bare == templated == (begin, *TOKENIZER("hi")["input_ids"])
