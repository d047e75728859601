"""A run directory never holds half a file, never overwrites a run, and forgets on request."""

import json

import pytest

from rlalign.tracking.rundir import (
    RunDir,
    RunDirError,
    changed_settings,
    free_run_dir,
    make_manifest,
    run_to_resume,
    write_atomic,
)


@pytest.fixture
def run_dir(tmp_path):
    found = free_run_dir(tmp_path, "run")
    found.create("name: run\n", make_manifest(3, {"train": "abc"}, 1))
    return found


def test_a_second_run_of_the_same_name_gets_its_own_folder(run_dir, tmp_path):
    second = free_run_dir(tmp_path, "run")
    second.create("name: run\n", {})
    third = free_run_dir(tmp_path, "run")
    assert (second.path.name, third.path.name) == ("run-2", "run-3")
    assert run_dir.config.read_text() == "name: run\n"


def test_creating_over_an_existing_run_is_refused(run_dir):
    with pytest.raises(RunDirError, match="exists already"):
        RunDir(run_dir.path).create("other", {})


def test_discard_after_keeps_whole_records_up_to_the_step_and_drops_a_torn_line(run_dir):
    for step in range(1, 6):
        run_dir.append_metrics({"step": step, "reward": step / 10})
        run_dir.write_rollouts(step, [{"step": step}])
        run_dir.write_trees(step, [{"step": step}] if step % 2 else [])
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    run_dir.discard_after(3)
    assert [row["step"] for row in run_dir.read_metrics()] == [1, 2, 3]
    assert [f.stem for f in sorted(run_dir.rollouts.iterdir())] == [
        "step_000001",
        "step_000002",
        "step_000003",
    ]
    assert sorted(f.stem for f in run_dir.trees.iterdir()) == ["step_000001", "step_000003"]
    run_dir.append_metrics({"step": 4, "reward": 0.0})
    assert len(run_dir.read_metrics()) == 4


def test_a_torn_last_line_is_not_read(run_dir):
    run_dir.append_metrics({"step": 1, "reward": 0.5})
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 2, "rew')
    assert run_dir.read_metrics() == [{"step": 1, "reward": 0.5}]


def test_numbers_in_the_data_that_are_not_finite_are_null_at_any_depth(run_dir):
    run_dir.write_rollouts(1, [{"answer": float("nan"), "rewards": {"f": [1.0, float("inf")]}}])
    text = run_dir.rollout_file(1).read_text()
    assert json.loads(text) == {"answer": None, "rewards": {"f": [1.0, None]}}


def make_run(folder, name: str, configured: str, *, finished: bool) -> None:
    made = RunDir(folder / name)
    made.create(f"name: {configured}\n", {})
    if finished:
        made.write_result({"steps": 1})


@pytest.mark.parametrize(
    ("finished", "expected"),
    [
        ((True, False, False), "exp-10"),
        ((True, False, True), "exp-2"),
        ((False, True, True), "exp"),
        ((True, True, True), "exp-10"),
    ],
)
def test_resuming_goes_on_with_the_newest_unfinished_run_of_that_name(tmp_path, finished, expected):
    for name, done in zip(("exp", "exp-2", "exp-10"), finished, strict=True):
        make_run(tmp_path, name, "exp", finished=done)
    make_run(tmp_path, "exp-99", "exp-99", finished=False)  # another experiment, by its own name
    make_run(tmp_path, "exp-b", "exp-b", finished=False)
    assert run_to_resume(tmp_path, "exp").path.name == expected
    assert run_to_resume(tmp_path, "exp-2").path.name == "exp-2"


def test_a_folder_without_configuration_is_no_run_to_resume(tmp_path):
    (tmp_path / "exp").mkdir()
    with pytest.raises(RunDirError, match=r"no run at .*known runs: exp"):
        run_to_resume(tmp_path, "exp")


def test_changed_settings_are_named_with_both_values():
    before = "name: a\ntrainer: {max_steps: 5, optim: {learning_rate: 0.1}}\nold: 1\n"
    after = "name: b\ntrainer: {max_steps: 8, optim: {learning_rate: 0.1}}\nnew: {}\n"
    assert changed_settings(before, after) == [
        "trainer.max_steps: 5 -> 8",
        "old: 1 -> None",
        "new: None -> {}",
    ]


def test_figures_that_are_not_finite_are_null_in_the_file(run_dir):
    run_dir.append_metrics({"step": 1, "reward": float("nan"), "kl": float("inf")})
    assert json.loads(run_dir.metrics.read_text()) == {"step": 1, "reward": None, "kl": None}


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, "old")

    def broken(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_the_manifest_says_what_ran(run_dir):
    manifest = json.loads(run_dir.manifest.read_text())
    assert manifest["seed"] == 3 and manifest["data_digests"] == {"train": "abc"}
    assert manifest["versions"]["torch"] and manifest["hardware"]["cpus"] >= 1
