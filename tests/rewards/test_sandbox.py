"""Each escape is tried for real. What must not happen is checked from outside where it can be."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlalign.rewards.jail
from rlalign.rewards import sandbox
from rlalign.rewards.sandbox import Limits, run
from rlalign.rewards.verdict import VerdictKind

# So little memory that a busy machine fills it well within the CPU second.
TIGHT = Limits(wall_s=4.0, cpu_s=1, memory_bytes=128 << 20, scratch_bytes=4 << 20)
OK = VerdictKind.OK


def test_tests_see_the_code_and_each_is_judged():
    outcome = run("def f(x): return x + 1", ["assert f(1) == 2", "assert f(1) == 3", "f(1) / 0"])
    assert outcome.kind is OK
    assert outcome.passed == (True, False, False)


def test_a_program_reads_stdin_and_its_output_comes_back():
    outcome = run("import sys\nprint(sys.stdin.read().upper())\nsys.exit(0)", stdin="grüezi")
    assert (outcome.kind, outcome.passed, outcome.stdout) == (OK, (True,), "GRÜEZI\n")


@pytest.mark.parametrize(
    "code", ["def f(", "1 / 0", "raise SystemExit(0)", "def f(): f()\nf()", "raise BaseException"]
)
def test_code_that_fails_is_a_wrong_answer_and_no_failure_of_ours(code):
    outcome = run(code, ["assert True"])
    assert (outcome.kind, outcome.passed) == (OK, (False,))
    assert outcome.detail


def test_a_test_that_is_not_python_is_invalid_data():
    outcome = run("x = 1", ["assert ("])
    assert outcome.kind is VerdictKind.INVALID
    assert "assert (" in outcome.detail


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("while True: pass", VerdictKind.TIMEOUT),
        ("x = ' ' * (10 ** 10)", VerdictKind.OOM),
        ("x = []\nwhile True: x.append('a' * 10 ** 6)", VerdictKind.OOM),
        ("import os; os._exit(0)", VerdictKind.CRASH),
        ("import ctypes; ctypes.string_at(0)", VerdictKind.CRASH),
        ("import os; os.closerange(3, 4096)", VerdictKind.CRASH),
    ],
)
def test_limits_and_early_ends_have_their_own_kinds(code, kind):
    assert run(code, limits=TIGHT).kind is kind


def test_sleep_is_killed_at_the_wall_clock_limit():
    start = time.monotonic()
    outcome = run("import time; time.sleep(60)", limits=Limits(wall_s=0.5))
    assert outcome.kind is VerdictKind.TIMEOUT
    assert time.monotonic() - start < 5


def test_ignoring_the_signal_of_the_cpu_limit_does_not_help():
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(code, limits=TIGHT).kind is VerdictKind.TIMEOUT


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['ls'])",
        "import os; os.execv('/bin/sh', ['sh'])",
        "import multiprocessing as m; m.Process(target=print).start()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.killpg(0, 9)",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:80')",
        "open('/etc/passwd')",
        "import os; os.listdir('/')",
        "import os; open(f'/proc/{os.getppid()}/environ')",
        "import os; open('/proc/self/environ')",
        "open('/tmp/rlalign-escape', 'w')",
        "import os; os.setuid(12345)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    ],
)
def test_an_escape_is_refused_as_an_error_inside_the_program(code):
    outcome = run(code, limits=TIGHT)
    assert (outcome.kind, outcome.passed) == (OK, (False,))
    assert not Path("/tmp/rlalign-escape").exists()


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 1000)",
        "f = open('big', 'w')\nwhile True: f.write('x' * 100000)",
        "i = 0\nwhile True:\n    open(str(i), 'w').write('x' * 10 ** 5)\n    i += 1",
    ],
)
def test_output_and_files_are_bounded(code):
    limits = Limits(file_bytes=1 << 20, scratch_bytes=4 << 20, cpu_s=5)
    outcome = run(code, limits=limits)
    assert outcome.passed == (False,)
    assert len(outcome.stdout) <= 1 << 20


def test_nothing_of_the_trainer_is_visible(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    code = "import os, sys\nprint(dict(os.environ), os.listdir('.'), 'rlalign' in sys.modules)"
    outcome = run(code)
    assert "hunter2" not in outcome.stdout
    assert outcome.stdout.rstrip().endswith("[] False")


def test_no_file_descriptor_of_the_trainer_is_inherited(tmp_path):
    with open(tmp_path / "secret", "w"):
        code = "import os\nfor fd in range(3, 60):\n    try: print(os.fstat(fd).st_size)\n"
        outcome = run(code + "    except OSError: pass")
    assert len(outcome.stdout.split()) <= 3  # the report and the lifeline


def test_threads_files_in_scratch_and_installed_packages_work():
    code = """
import asyncio, threading, tempfile, numpy
found = []
thread = threading.Thread(target=found.append, args=(1,))
thread.start()
thread.join()
with tempfile.TemporaryFile("w+") as file:
    file.write("x")
assert found == [1] and numpy.arange(4).sum() == 6
assert asyncio.run(asyncio.sleep(0, 5)) == 5
"""
    outcome = run(code)
    assert outcome.passed == (True,), outcome.detail


def test_the_scratch_folder_is_gone_even_when_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    run("import os\nos.mkdir('d')\nopen('d/f', 'w').close()\nos.chmod('d', 0)")
    assert list(tmp_path.iterdir()) == []


def test_a_forged_report_cannot_break_the_parent():
    junk = b'[1]\n{"kind": 5}\n\xff\n'
    code = f"import os\nfor fd in range(3, 9):\n  try: os.write(fd, {junk!r})\n"
    outcome = run(code + "  except OSError: pass", ["assert True"])
    assert outcome.kind in (OK, VerdictKind.CRASH)


def test_isolation_is_reported():
    active = sandbox.isolation()
    assert active["limits"]
    assert active["network"]
    assert set(active) >= {"network", "files", "processes", "unprivileged", "bounded_scratch"}


def layer(setup: str, attempt: str) -> str:
    """What `attempt` raises in a fresh interpreter that has only the layer `setup` of the jail."""
    source = f"""
import os, socket, sys
sys.path.insert(0, {os.path.dirname(rlalign.rewards.jail.__file__)!r})
import jail
assert jail.drop_capabilities() and {setup}
try:
    {attempt}
except OSError as error:
    print(type(error).__name__)
"""
    command = [sys.executable, "-P", "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("setup", "attempt", "error"),
    [
        ("jail.filter_calls(os.getpid())", "socket.socket()", "PermissionError"),
        ("jail.filter_calls(os.getpid())", "os.fork()", "PermissionError"),
        ("jail.filter_calls(os.getpid())", "os.kill(os.getppid(), 0)", "PermissionError"),
        ("jail.filter_calls(os.getpid())", "os.kill(os.getpid(), 0)", ""),
        ("jail.restrict_files([], [], [])", "open('/etc/passwd')", "PermissionError"),
        ("jail.restrict_files(['/etc'], [], [])", "open('/etc/passwd')", ""),
        ("jail.restrict_files(['/tmp'], [], [])", "os.mkdir('/tmp/rlalign-no')", "PermissionError"),
    ],
)
def test_each_layer_holds_alone(setup, attempt, error):
    assert layer(setup, attempt) == error
