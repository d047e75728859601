"""The doctor names the planted illness and is silent about a healthy run."""

import pytest

from rlalign.tracking.doctor import examine_machine, examine_run
from rlalign.tracking.rundir import RunDir, RunDirError

HEALTHY = {
    "frac_reward_zero_std": 0.3,
    "completions/clipped_ratio": 0.01,
    "sampling/logp_diff/max": 1e-5,
    "entropy": 0.4,
    "optim/grad_norm": 0.7,
    "optim/skipped_steps": 0.0,
    "clip_ratio/high": 0.01,
}


def run_with(tmp_path, **changes):
    run_dir = RunDir(tmp_path / "run")
    run_dir.create("name: run\n", {})
    for step in range(1, 21):
        run_dir.append_metrics({"step": step, "reward": 0.5} | HEALTHY | changes)
    return run_dir.path


def warnings(path) -> list[str]:
    return [finding.what for finding in examine_run(path) if finding.level != "ok"]


def test_a_healthy_run_gets_no_warning(tmp_path):
    assert warnings(run_with(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frac_reward_zero_std", 0.95),
        ("completions/clipped_ratio", 0.6),
        ("sampling/logp_diff/max", 0.9),
        ("entropy", 0.001),
        ("optim/grad_norm", 0.0),
        ("rewards/errors/timeout", 4.0),
    ],
)
def test_each_illness_is_named(tmp_path, name, value):
    [what] = warnings(run_with(tmp_path, **{name: value}))
    assert what.startswith(name)


def test_no_metrics_is_an_error(tmp_path):
    with pytest.raises(RunDirError, match="no metrics"):
        examine_run(tmp_path)


def test_this_machine_can_run_what_the_suite_runs():
    assert [f for f in examine_machine() if f.level == "error"] == []
