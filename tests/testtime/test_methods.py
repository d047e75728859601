"""The methods by name: each is found, runs by the command on a model, and can be drawn."""

from __future__ import annotations

import json
from typing import Any

import pytest

import rlalign.testtime as testtime
from rlalign.config.load import parse
from rlalign.tasks.mini import get_mini_task
from rlalign.testtime.decode_rows import Row
from rlalign.testtime.decode_text import Progress, TextJob, as_prompts, decode_text
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.methods import METHODS, NONE, find_method
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.rewards import FunctionReward
from rlalign.testtime.text_page import write_text_page

SHORT = ["max_new_tokens=24"]
OPTIONS: dict[str, list[str]] = {
    "best-of-n": ["num_samples=2"],
    "majority": ["num_samples=2"],
    "latent-seek": ["rho=0.5", "lr=1", "max_steps=3"],
    "rain": ["max_searches=4", "min_fresh=2", "num_candidates=3", "score_range=[-1,0]"],
    "logit-fusion": ["speculate=2"],
}
COLUMNS = {  # of a trace, which the page draws
    "best-of-n": {"method", "samples"},
    "majority": {"method", "answers", "samples"},
    "latent-seek": {"method", "num_latents", "steps"},
    "rain": {"method", "commits", "nodes", "dropped"},
    "logit-fusion": {"method", "alphas", "experts"},
}


def right(prompts, completions, answer, **columns) -> list[float]:
    pairs = zip(completions, answer, strict=True)
    return [0.0 if f"<answer>{a}</answer>" in text else -1.0 for text, a in pairs]


@pytest.mark.parametrize("name", METHODS)
def test_each_method_writes_the_records_of_its_function_and_a_page(name, tmp_path):
    how = find_method(name)
    rows = [
        dict(row, id=f"r{i}") for i, row in enumerate(get_mini_task("chain").make_rows("eval")[:4])
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": []}]))
    given: dict[str, Any] = (
        {"model": "mini:chain"} if how.models else {"model": open_engine("mini:chain")}
    )
    given |= {"small": "mini:chain", "experts": ["mini:chain"]} if how.models else {}
    given |= {} if how.reward == NONE else {"reward": right}
    seen: list[tuple[int, int]] = []

    def note(progress: Progress) -> None:
        seen.append((progress.done, progress.tokens))

    job = TextJob(name, source=source, out=out, overrides=SHORT + OPTIONS[name], **given)
    summary = decode_text(job, on_progress=note)
    records = {record["id"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert set(records) == {"r0", "r1", "r2", "r3", "4"} and records["4"]["error"]
    assert summary.accuracy is not None and ("errors", "1") in summary.rows()
    assert seen[-1] == (5, sum(record["num_generated_tokens"] for record in records.values()))

    settings = parse(how.config_class(), {}, SHORT + OPTIONS[name])
    prompts = as_prompts([Row(row["id"], row) for row in rows])
    if how.models:
        fused = how.open_models(
            "mini:chain", "mini:chain", ["mini:chain"], device="cpu", dtype="float32"
        )
        results = how.load()(fused, prompts, settings)
    else:
        with FunctionReward(right) as reward:
            results = how.load()(given["model"], prompts, reward, settings)
    for result in results:
        record = records[result.id]
        expected = json.loads(json.dumps(result.to_json())) | {"wall_s": record["wall_s"]}
        expected["counters"] = {k: v for k, v in expected["counters"].items() if k != "oracle"}
        found = {k: record[k] for k in expected}
        found["counters"] = {k: v for k, v in record["counters"].items() if k != "oracle"}
        assert found == expected
        assert set(record["trace"]) == COLUMNS[name]
        assert record["counters"].get("oracle") == (None if how.reward == NONE else 1)
    assert write_text_page(out).stat().st_size > 10_000


def test_the_functions_are_those_of_the_package():
    for name, how in METHODS.items():
        assert getattr(testtime, name.replace("-", "_")) is how.load()


def test_an_unknown_method_names_those_there_are():
    with pytest.raises(DecodeError, match="best-of-n, majority, latent-seek, rain, logit-fusion"):
        find_method("best-of")
