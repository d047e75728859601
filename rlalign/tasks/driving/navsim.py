"""The real NAVSIM score, from a process of its own: its devkit pins a Python and a torch of 2023.

The process runs navsim_server.py in the devkit's Python, whose requirements never meet ours. They
talk through a socket: JSON with its length before it (rlalign/channel.py), every wait with a
deadline. A process that dies or hangs is replaced once for each request.

    server  {"metric": "pdms-v1.1"}                                             once, when ready
    client  {"id", "token", "poses": [K, 8, 3], "interval_s": 0.5, "oracle": "gt" | "cv"}
    server  {"id", "nc", "dac", "ttc", "comfort", "progress", "pdms": [K],
             "nc_steps", "dac_steps", "ttc_steps": [K, 41]}       or  {"id", "error"}

The devkit, nuPlan's maps and OpenScene's logs have licences of their own and are not installed by
rlalign. Legend: K plans in the order asked, T = 41 instants, N = 8 waypoints.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy import ndarray

from rlalign.channel import Channel
from rlalign.tasks.driving.scenes import INSTANTS_PER_WAYPOINT, NUM_INSTANTS
from rlalign.tasks.driving.scorer import Scores
from rlalign.tasks.errors import TaskError

SERVER = Path(__file__).with_name("navsim_server.py")
WAYPOINT_INTERVAL_S = 0.5
ATTEMPTS = 2
EXIT_TIMEOUT_S = 5.0
LOG_TAIL_BYTES = 2000


class NavsimError(TaskError):
    """The scorer process cannot be used, or refuses a request."""


class NavsimScorer:
    """Scores plans of NAVSIM scenes. Use it as a context, or call `close`.

    `command` starts the server and gets its socket's descriptor as a further argument after the
    script; `metric` is the version that it must announce.

    >>> with NavsimScorer.of_devkit("/envs/navsim/bin/python", "/data/metric_cache") as navsim:
    ...     navsim.score("c1b2...", states_KT3, oracle="cv").pdms_K
    """

    def __init__(
        self,
        command: Sequence[str],
        arguments: Sequence[str] = (),
        *,
        metric: str = "pdms-v1.1",
        timeout_s: float = 60.0,
        start_timeout_s: float = 300.0,
    ) -> None:
        self.command, self.arguments, self.metric = list(command), list(arguments), metric
        self.timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self.num_restarts = 0
        self._last_id = 0
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def of_devkit(python: str, metric_cache: str, **settings: Any) -> NavsimScorer:
        """With the devkit installed in the environment of that `python`."""
        return NavsimScorer([python, str(SERVER)], [metric_cache], **settings)

    def score(self, token: str, states_KT3: ndarray, oracle: str = "gt") -> Scores:
        """Of plans as states (x, y, heading) [K, 41, 3] in the ego frame of scene `token`; sent are
        the 8 waypoints, which the devkit drives with a controller of its own.

        Raises NavsimError when the process cannot be started or announces another metric, when two
        in a row die or do not answer in time, or for an answer that is none.
        """
        poses_KN3 = states_KT3[:, INSTANTS_PER_WAYPOINT::INSTANTS_PER_WAYPOINT]
        if states_KT3.shape[1:] != (NUM_INSTANTS, 3) or not np.isfinite(poses_KN3).all():
            raise NavsimError(f"plans are [K, 41, 3] finite states, not {states_KT3.shape}")
        if oracle not in ("gt", "cv"):
            raise NavsimError(f"oracle={oracle!r}: the NAVSIM scorer knows 'gt' and 'cv'")
        self._last_id += 1
        request = {"id": self._last_id, "token": token, "poses": poses_KN3.tolist()}
        request |= {"interval_s": WAYPOINT_INTERVAL_S, "oracle": oracle}
        return _read_scores(self._ask(request), token, len(states_KT3))

    def close(self) -> None:
        """End the process, with all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(EXIT_TIMEOUT_S)
        self._channel.close()
        self._log.close()

    def __enter__(self) -> NavsimScorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        failure: Exception | None = None
        problem = ""
        for attempt in range(ATTEMPTS):
            if self._process is None:
                self.num_restarts += attempt
                self._start()
            try:
                deadline = time.monotonic() + self.timeout_s
                self._channel.send(request, deadline)
                reply = self._channel.receive(deadline)
                break
            except TimeoutError as error:
                failure, problem = error, f"did not answer within {self.timeout_s:g} s"
            except (OSError, EOFError, ValueError) as error:
                failure, problem = error, f"broke off ({error})\n{self._log_tail()}".strip()
            self.close()
        else:
            raise NavsimError(
                f"scene {request['token']!r}: the NAVSIM scorer {problem}, twice in a row; run "
                f"{' '.join(self.command)} by hand, or raise timeout_s"
            ) from failure
        if reply.get("id") != request["id"]:
            self.close()  # whatever it says next is no answer to what is asked next
            raise NavsimError(
                f"request {request['id']} was answered as {reply.get('id')}: the server is not "
                "navsim_server.py of this version"
            )
        return reply

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed in close
        self._channel = Channel(ours)
        try:
            self._process = subprocess.Popen(
                [*self.command, str(theirs.fileno()), *self.arguments],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        except OSError as error:
            self._channel.close()
            self._log.close()
            raise NavsimError(
                f"the NAVSIM scorer cannot be started ({error}): {self.command[0]} must be the "
                "Python of the devkit's environment"
            ) from error
        finally:
            theirs.close()
        self._greet()

    def _greet(self) -> None:
        """Wait until it is ready, and refuse a metric that was not asked for."""
        try:
            ready = self._channel.receive(time.monotonic() + self.start_timeout_s)
            metric = ready["metric"]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            log = self._log_tail()
            self.close()
            raise NavsimError(
                f"the NAVSIM scorer did not get ready within {self.start_timeout_s:g} s "
                f"({error or type(error).__name__}); is the devkit installed there?\n{log}".strip()
            ) from error
        if metric != self.metric:
            self.close()
            raise NavsimError(
                f"the NAVSIM scorer computes {metric!r}, not {self.metric!r}, and the two cannot "
                "be compared: check out the other branch of the devkit, or ask for this metric"
            )

    def _log_tail(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
        return tail.decode(errors="replace").strip()


def _read_scores(reply: dict[str, Any], token: str, num: int) -> Scores:
    """Raises NavsimError for an error, or for numbers of the wrong shape or outside [0, 1]."""
    if "error" in reply:
        raise NavsimError(f"scene {token!r}: the NAVSIM scorer failed: {reply['error']}")
    columns: dict[str, ndarray] = {}
    for name in ("nc", "dac", "ttc", "comfort", "progress", "pdms"):
        columns[f"{name}_K"] = _column(reply, name, (num,))
    for name in ("nc", "dac", "ttc"):
        columns[f"{name}_KT"] = _column(reply, f"{name}_steps", (num, NUM_INSTANTS))
    return Scores(**columns, hard_K=columns["nc_K"] * columns["dac_K"])


def _column(reply: dict[str, Any], name: str, shape: tuple[int, ...]) -> ndarray:
    try:
        values = np.array(reply[name], dtype=float)
    except (KeyError, ValueError, TypeError) as error:
        raise NavsimError(f"the NAVSIM scorer's {name!r} is missing or no array") from error
    if values.shape != shape or not ((values >= 0) & (values <= 1)).all():
        raise NavsimError(
            f"the NAVSIM scorer's {name!r} is {values.shape}, from {values.min(initial=0)} to "
            f"{values.max(initial=0)}; it must be {shape}, in [0, 1]"
        )
    return values
