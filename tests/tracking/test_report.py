"""The report embeds whatever the samples contain, loads nothing, and keeps within its size."""

import json
import re

import pytest

from rlalign.tracking.report import collect_data, write_report
from rlalign.tracking.rundir import RunDir, RunDirError

HOSTILE = "</script><script>alert('NaN')</script>\u2028 <b>&amp; NaN Infinity é"


@pytest.fixture
def run_dir(tmp_path):
    found = RunDir(tmp_path / "run")
    found.create("name: run\n", {"seed": 0, "started": "today"})
    for step in range(1, 11):
        found.append_metrics({"step": step, "reward": step / 10, "kl": float("nan")})
        row = {"step": step, "prompt": HOSTILE, "completion": HOSTILE, "reward": None, "acc": 1.0}
        found.write_rollouts(step, [row | {"advantage": 0.5}] * 4)
    return found


def embedded(page: str) -> dict:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_hostile_samples_come_back_letter_by_letter(run_dir):
    page = write_report(run_dir.path).read_text()
    assert embedded(page)["samples"][0]["completion"] == HOSTILE
    assert "<script>alert" not in page


def test_the_page_loads_nothing_from_elsewhere(run_dir):
    page = write_report(run_dir.path).read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(", page)


def test_too_many_samples_are_thinned_by_whole_steps_and_counted(run_dir):
    data = collect_data(run_dir, max_samples=12)
    steps = [row["step"] for row in data["samples"]]
    assert sorted(set(steps)) == [1, 5, 10] or sorted(set(steps)) == [1, 6, 10]
    assert data["omitted_steps"] == 7 and len(steps) == 12


def test_an_unfinished_run_can_be_drawn(run_dir):
    assert embedded(write_report(run_dir.path).read_text())["result"] is None


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirError, match="not a run directory"):
        write_report(tmp_path)
