"""The sandboxed interpreter: lock in, run one untrusted program, report.

`rlalign.rewards.sandbox` starts it as `python -I -S sandbox_main.py JOB REPORT LIFELINE` (three
file descriptors), so it imports nothing of the project but `jail.py` beside it. It reports two JSON
lines: the active isolation, before any untrusted code runs, and then the outcome. A program that
ends the interpreter itself leaves no second line.
"""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    job_fd, report_fd, lifeline_fd = map(int, sys.argv[1:4])
    with os.fdopen(job_fd) as file:
        job = json.load(file)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())  # as in worker_main.die_with_parent
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    for test in job["tests"]:
        try:
            ast.parse(test)
        except SyntaxError as error:
            return report(report_fd, {"kind": "invalid", "detail": f"test {test!r}: {error}"})
    isolation = lock_in(job)
    report(report_fd, {"isolation": isolation})
    if not job["allow_weak_isolation"] and not (isolation["network"] and isolation["files"]):
        return
    sys.path += job["packages"]
    sys.argv = ["solution.py"]
    report(report_fd, run(job))
    os._exit(0)  # no exit handlers of the program


def lock_in(job: dict[str, Any]) -> dict[str, bool]:
    """Every layer the kernel offers; what is active."""
    jail = load_jail()
    scratch = job["scratch"]
    namespaces = jail.enter_namespaces()
    mounted = namespaces and jail.mount_scratch(scratch, job["scratch_bytes"])
    os.chdir(scratch)
    limited = jail.set_limits(job["limits"])
    unprivileged = jail.drop_capabilities()
    files = jail.restrict_files(job["readable"], [scratch], job["devices"])
    filtered = jail.filter_calls(os.getpid())
    return {
        "network": namespaces or filtered,
        "files": files,
        "processes": filtered,
        "limits": limited,
        "unprivileged": unprivileged,
        "bounded_scratch": mounted,
    }


def load_jail() -> Any:
    spec = importlib.util.spec_from_file_location("jail", Path(__file__).with_name("jail.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The program, then each test in its namespace; `passed` has one entry per test, or a single
    one for a program without tests."""
    namespace: dict[str, Any] = {"__name__": "solution" if job["tests"] else "__main__"}
    error = execute(job["code"], "<completion>", namespace)
    if error == "MemoryError" or (error is None and not job["tests"]):
        return {"kind": "oom"} if error else {"kind": "ok", "passed": [True], "detail": ""}
    if error is not None:
        return {"kind": "ok", "passed": [False] * max(1, len(job["tests"])), "detail": error}
    errors = [execute(test, f"<test {i}>", namespace) for i, test in enumerate(job["tests"])]
    if "MemoryError" in errors:
        return {"kind": "oom"}
    detail = next((e for e in errors if e is not None), "")
    return {"kind": "ok", "passed": [e is None for e in errors], "detail": detail}


def execute(source: str, filename: str, namespace: dict[str, Any]) -> str | None:
    """None when the source ran to its end (or left with status 0 as a program), else what it
    raised."""
    try:
        try:
            exec(compile(source, filename, "exec"), namespace)
        except SystemExit as error:
            if error.code or namespace["__name__"] != "__main__":
                return f"SystemExit: {error.code}"
        sys.stdout.flush()
    except MemoryError:
        return "MemoryError"
    except BaseException as error:  # untrusted code may raise anything, KeyboardInterrupt included
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def report(report_fd: int, message: dict[str, Any]) -> None:
    os.write(report_fd, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
