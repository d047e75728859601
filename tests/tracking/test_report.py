"""The report embeds whatever the samples contain, loads nothing, and keeps within its size."""

import fnmatch
import itertools
import json
import re
import tomllib

import pytest

from rlalign.tracking.report import SCRIPTS, TEMPLATE, collect_data, write_report
from rlalign.tracking.rundir import RunDir, RunDirError
from tests.support import ROOT

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


def write_trees(run_dir, step, *trees):
    folder = run_dir.path / "trees"
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(t) + "\n" for t in trees))


def tree(step, number=0, **nodes):
    """A root with two leaves."""
    columns = {
        "parent": [-1, 0, 0],
        "depth": [0, 1, 1],
        "kind": ["root", "policy", "policy"],
        "value": [0.5, None, 0.5],
        "advantage": [0.0, 0.0, 0.7],
        "kept": [False, False, True],
        "reward": [None, None, 0.5],
        "text": ["", HOSTILE, "x"],
    }
    row = {"step": step, "tree": number, "prompt_id": "p/1", "prompt": HOSTILE, "answer": None}
    return row | {"nodes": columns | nodes}


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


def test_trees_come_back_letter_by_letter(run_dir):
    rows = [tree(4, 0), tree(4, 1), tree(9, 0)]
    write_trees(run_dir, 4, *rows[:2])
    write_trees(run_dir, 9, rows[2])
    page = write_report(run_dir.path).read_text()
    data = embedded(page)
    assert data["trees"] == rows and data["omitted_tree_steps"] == 0
    assert "<script>alert" not in page


def test_a_run_without_trees_has_none(run_dir):
    data = collect_data(run_dir, max_samples=100)
    assert data["trees"] == [] and data["omitted_tree_steps"] == 0


@pytest.mark.parametrize("fit", [1, 2, 3, 5, 7, 10])
def test_trees_are_thinned_by_whole_steps_within_their_bytes(run_dir, fit):
    image = "data:image/png;base64," + "A" * 1000
    rows = [tree(step, image=[None, image, image]) for step in range(10, 20)]
    for row in rows:
        write_trees(run_dir, row["step"], row)
    limit = fit * (len(json.dumps(rows[0])) + 1)
    data = collect_data(run_dir, 100, max_tree_bytes=limit)
    steps = [row["step"] for row in data["trees"]]
    assert len(steps) == fit and data["omitted_tree_steps"] == 10 - fit
    assert steps == sorted(steps) and steps[-1] == 19 and (fit == 1 or steps[0] == 10)
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert all(row["nodes"]["image"][1] == image for row in data["trees"])


def test_of_a_step_that_is_too_large_the_first_trees_stay(run_dir):
    rows = [tree(1, number) for number in range(5)]
    write_trees(run_dir, 1, *rows)
    data = collect_data(run_dir, 100, max_tree_bytes=3 * len(json.dumps(rows[0])) + 10)
    assert [row["tree"] for row in data["trees"]] == [0, 1, 2]


@pytest.mark.parametrize(("limit", "kept"), [(3500, [2]), (6500, [2, 3]), (9500, [0, 2, 3])])
def test_a_tree_that_is_too_large_loses_the_images_of_inner_nodes_first(run_dir, limit, kept):
    images = ["data:image/png;base64," + letter * 3000 for letter in "ABCD"]
    row = tree(1, parent=[-1, 0, 1, 0], image=list(images))
    write_trees(run_dir, 1, row)
    [found] = collect_data(run_dir, 100, max_tree_bytes=limit)["trees"]
    assert found["nodes"]["image"] == [images[i] if i in kept else None for i in range(4)]
    assert found["nodes"]["value"] == row["nodes"]["value"]


def test_no_file_of_the_page_makes_markup_of_data_or_ends_its_script():
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|DOMParser|new Function"
    )
    for path in [TEMPLATE, *SCRIPTS]:
        assert not re.search(sinks, path.read_text()), path
    for path in SCRIPTS:
        assert "</" not in path.read_text() and "<!--" not in path.read_text()


def test_the_files_of_the_page_are_installed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["rlalign"]
    for path in [TEMPLATE, *SCRIPTS]:
        name = str(path.relative_to(ROOT / "rlalign"))
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


def test_an_unfinished_run_can_be_drawn(run_dir):
    assert embedded(write_report(run_dir.path).read_text())["result"] is None


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirError, match="not a run directory"):
        write_report(tmp_path)
