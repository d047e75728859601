"""A run directory never holds half a file, never overwrites a run, and forgets on request."""

import json

import pytest

from rlalign.tracking.rundir import (
    RunDir,
    RunDirError,
    free_run_dir,
    make_manifest,
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
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    run_dir.discard_after(3)
    assert [row["step"] for row in run_dir.read_metrics()] == [1, 2, 3]
    assert [f.stem for f in sorted(run_dir.rollouts.iterdir())] == [
        "step_000001",
        "step_000002",
        "step_000003",
    ]
    run_dir.append_metrics({"step": 4, "reward": 0.0})
    assert len(run_dir.read_metrics()) == 4


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
