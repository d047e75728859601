"""Prompts of image models: read as all data are, with texts in place of tokens."""

from __future__ import annotations

import json

import pytest

from rlalign.config import TaskConfig
from rlalign.tasks import TaskError
from rlalign.tasks.image_prompts import load_image_prompts


def test_the_ten_digits_are_the_prompts_of_both_splits():
    cfg = TaskConfig(train="mini:digits", eval="mini:digits")
    for split in ("train", "eval"):
        prompts = load_image_prompts(cfg, split=split)
        assert [(p.id, p.source, p.answer) for p in prompts] == [
            (f"mini:digits:{split}/{i}", f"digit {i}", i) for i in range(10)
        ]
    assert sorted(p.answer for p in load_image_prompts(cfg, split="train").take(10, 10)) == list(
        range(10)
    )


def test_texts_of_a_file_keep_their_columns_and_broken_rows_are_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a red cube " * 40, "style": "photo"}, {"text": "lost"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match="1 missing prompt"):
        load_image_prompts(TaskConfig(train=str(file)), split="train")
    prompts = load_image_prompts(
        TaskConfig(train=str(file), on_bad_row="skip", max_prompt_length=1), split="train"
    )
    assert [(p.source, p.columns) for p in prompts] == [(rows[0]["prompt"], {"style": "photo"})]
