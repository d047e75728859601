"""Untrusted Python in a process that can do nothing but compute: its parent side.

One fresh interpreter per program (`python -I -S`), with an empty environment, resource limits, no
network, no other processes, and no files but the interpreter's own and an empty scratch folder; see
`jail` for the layers and docs/rewards.md for what they do not promise. The whole process group is
killed at the wall-clock limit, and dies with the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlalign.rewards.verdict import VerdictKind

SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. Memory is address space; `file_bytes` bounds each file and the
    output; `scratch_bytes` all files together."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 8 << 20
    scratch_bytes: int = 32 << 20
    open_files: int = 64
    threads: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program. ok: it was run, and `passed` says how each test went; timeout, oom
    and crash (the interpreter died or was ended): the program's own doing; invalid: a test is not
    Python. `isolation` names the layers that were active."""

    kind: VerdictKind
    passed: tuple[bool, ...] = ()
    stdout: str = ""
    detail: str = ""
    isolation: Mapping[str, bool] = field(default_factory=dict)


def run(
    code: str,
    tests: Sequence[str] = (),
    *,
    stdin: str = "",
    limits: Limits = Limits(),
    allow_weak_isolation: bool = False,
) -> Outcome:
    """Run `code`, then each test statement in its namespace; without tests, run it as a program
    that reads `stdin`. Never raises for what the code does. Blocks for at most about `wall_s`."""
    with ExitStack() as stack:
        scratch = stack.enter_context(_scratch_folder())
        job = _job(code, tests, scratch, limits, allow_weak_isolation)
        job_fd = stack.enter_context(_memory_file(json.dumps(job)))
        stdin_fd = stack.enter_context(_memory_file(stdin))
        report_fd, out_fd, err_fd = (stack.enter_context(_memory_file("")) for _ in range(3))
        lifeline_read, lifeline_write = os.pipe()
        stack.callback(os.close, lifeline_write)
        passed_fds = (job_fd, report_fd, lifeline_read)
        main = str(Path(__file__).with_name("sandbox_main.py"))
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", main, *map(str, passed_fds)],
            pass_fds=passed_fds,
            stdin=stdin_fd,
            stdout=out_fd,
            stderr=err_fd,
            cwd=scratch,
            env={"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.close(lifeline_read)
        in_time, cpu_s = _finish(process, limits.wall_s)
        return _outcome(
            lines=_report_lines(_contents(report_fd, limits)),
            num_results=max(1, len(tests)),
            returncode=process.returncode,
            timed_out=not in_time or cpu_s >= limits.cpu_s,
            stdout=_contents(out_fd, limits),
            stderr=_contents(err_fd, limits),
        )


def isolation() -> Mapping[str, bool]:
    """Which layers this machine offers: network, files, processes, limits, ..."""
    return run("pass", allow_weak_isolation=True).isolation


def _job(
    code: str, tests: Sequence[str], scratch: str, limits: Limits, allow_weak_isolation: bool
) -> dict[str, Any]:
    paths = sysconfig.get_paths()
    packages = list(dict.fromkeys([paths["purelib"], paths["platlib"]]))
    library = [paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib")]
    return {
        "code": code,
        "tests": list(tests),
        "scratch": scratch,
        "scratch_bytes": limits.scratch_bytes,
        "packages": packages,
        "readable": [*library, *packages, *SYSTEM_PATHS],
        "devices": DEVICES,
        "allow_weak_isolation": allow_weak_isolation,
        "limits": {
            "CPU": limits.cpu_s,
            "AS": limits.memory_bytes,
            "FSIZE": limits.file_bytes,
            "NOFILE": limits.open_files,
            "NPROC": limits.threads,
            "CORE": 0,
        },
    }


def _finish(process: subprocess.Popen[bytes], wall_s: float) -> tuple[bool, float]:
    """Wait, kill the group, reap: whether it ended in time, and its CPU seconds."""
    handle = os.pidfd_open(process.pid)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    try:
        in_time = bool(poll.poll(wall_s * 1000))
    finally:  # also when this thread is interrupted
        os.close(handle)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return in_time, usage.ru_utime + usage.ru_stime


def _report_lines(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a report; a program may have scribbled into it."""
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _outcome(
    *,
    lines: list[dict[str, Any]],
    num_results: int,
    returncode: int,
    timed_out: bool,
    stdout: str,
    stderr: str,
) -> Outcome:
    active = next((line["isolation"] for line in lines if "isolation" in line), {})
    verdict = next((line for line in lines if "kind" in line), {})
    kind, passed, detail = verdict.get("kind"), verdict.get("passed"), verdict.get("detail", "")
    if kind in ("oom", "invalid"):
        return Outcome(VerdictKind(kind), detail=str(detail or "out of memory"), isolation=active)
    if kind == "ok" and isinstance(passed, list) and len(passed) == num_results:
        return Outcome(VerdictKind.OK, tuple(map(bool, passed)), stdout, str(detail), active)
    if timed_out or returncode == -signal.SIGXCPU:
        return Outcome(VerdictKind.TIMEOUT, detail="over its time limit", isolation=active)
    if returncode == -signal.SIGKILL:
        detail = "killed by SIGKILL: out of memory, most likely"
        return Outcome(VerdictKind.OOM, detail=detail, isolation=active)
    died = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
    detail = f"the interpreter ended without a result: {died}; {stderr[-500:]}"
    return Outcome(VerdictKind.CRASH, detail=detail, isolation=active)


@contextmanager
def _scratch_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="rlalign-sandbox-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, onerror=_unlock)


def _unlock(function: Any, path: str, _: Any) -> None:
    """A program may have taken away permissions inside its folder."""
    os.chmod(os.path.dirname(path), 0o700)
    os.chmod(path, 0o700)
    function(path)


@contextmanager
def _memory_file(text: str) -> Iterator[int]:
    """A file in memory: no pipe to fill, no reader to wait for."""
    handle = os.memfd_create("rlalign")
    try:
        os.pwrite(handle, text.encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _contents(handle: int, limits: Limits) -> str:
    return os.pread(handle, limits.file_bytes, 0).decode(errors="replace")
