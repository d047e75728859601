"""A Python script in a process of its own: a socket to it, its output kept, and never an orphan.
And how a process leaves without taking its interpreter down."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

EXIT_TIMEOUT_S = 5.0
LOG_TAIL_BYTES = 2000


class Child:
    """Runs `script` with three arguments: the descriptors of its socket and of its lifeline, and
    the import path as JSON. The script calls `die_with_parent` with the second one.

    `socket` is our end. Output of both kinds goes to a file, of which `log_tail` has the end.
    """

    def __init__(self, script: Path, environment: Mapping[str, str] | None = None) -> None:
        self.socket, theirs = socket.socketpair()
        lifeline_read, self._lifeline = os.pipe()
        self._log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed in stop
        path = json.dumps([os.path.abspath(p) for p in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(theirs.fileno()), str(lifeline_read), path],
            pass_fds=(theirs.fileno(), lifeline_read),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=None if environment is None else {**os.environ, **environment},
        )
        theirs.close()
        os.close(lifeline_read)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout_s: float = EXIT_TIMEOUT_S) -> None:
        """Wait for its end, which may not come: it may live and talk nonsense."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def kill(self) -> None:
        """Send SIGKILL to it and to everything it started."""
        with contextlib.suppress(ProcessLookupError):  # the whole group is gone already
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> int | None:
        """Kill it with everything it started; the code it had ended with, None if it had not."""
        returncode = self._process.poll()
        self.kill()
        self._process.wait(EXIT_TIMEOUT_S)
        self.socket.close()
        os.close(self._lifeline)
        self._log.close()
        return returncode

    def log_tail(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
        return tail.decode(errors="replace").strip()

    def clear_log(self) -> None:
        """Keep the file small. The child writes at the same offset: one open file, shared."""
        self._log.seek(0)
        self._log.truncate(0)


def how_it_ended(returncode: int | None) -> str:
    """In words: "died of SIGSEGV", "exited with code 1"; for None "broke the protocol"."""
    if returncode is None:
        return "broke the protocol"
    if returncode < 0:
        return f"died of {signal.Signals(-returncode).name}"
    return f"exited with code {returncode}"


@contextlib.contextmanager
def leaving_at_once(*, when: bool = True) -> Iterator[None]:
    """End this process at the end of the block, with the code that the block asked for, and without
    taking the interpreter down. What is registered with `atexit` runs, and output is flushed.

    DeepSpeed keeps the process group of a job for ever, so gloo's threads live on while Python
    ends; one that wants the interpreter then aborts a job whose work is done. `when`: False for a
    process that ends as any other.
    """
    if not when:
        yield
        return
    code: object = 0
    try:
        yield
    except SystemExit as request:
        code = request.code
    except BaseException:  # what the interpreter would do with it
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def die_with_parent(lifeline_fd: int) -> None:
    """End this process when the one that started it ends, even by kill -9 and even inside a C call:
    nothing is ever written to the lifeline, and closing its other end raises SIGIO, whose default
    is to end the process. (A parent-death signal would fire when the thread that started us
    ends.)"""
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    try:
        gone = os.read(lifeline_fd, 1) == b""  # it may have closed before O_ASYNC was set
    except BlockingIOError:
        return
    if gone:
        os._exit(1)
