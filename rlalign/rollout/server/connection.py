"""The file through which jobs find a server: where it is, and the tokens to get in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlalign.errors import RlalignError


class ConnectionFileError(RlalignError):
    """The file that says where a server is and how to get in is missing or not private."""


@contextlib.contextmanager
def sole_server(path: Path):
    """Be the only server that may write the file `path`, until the block or this process ends.

    The lock is a file beside it, which stays: one that was deleted could be locked twice. What a
    server that was killed has written goes: its port may be somebody else's by now. Raises
    ConnectionFileError where another server lives.
    """
    lock = path.with_name(f"{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            file = stack.enter_context(os.fdopen(descriptor, "r+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConnectionFileError(
                f"process {file.read() or 'unknown'} serves under that name already ({path}): stop "
                "it, or give this server another one, e.g. name=second"
            ) from None
        except OSError as error:
            raise ConnectionFileError(f"{lock} cannot be locked: {error.strerror}") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        path.unlink(missing_ok=True)
        yield


def write_connection(
    path: Path, url: str, tokens: Mapping[str, str], certificate: str | None = None
) -> None:
    """Where the server is and how to get in, readable by its owner alone; with TLS, also the
    certificate by which it is known."""
    content = {"url": url, "tokens": dict(tokens), "pid": os.getpid()}
    if certificate is not None:
        content["certificate"] = certificate
    temporary = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
    temporary.replace(path)


def read_connection(path: Path) -> dict[str, Any]:
    """Raises ConnectionFileError with the fix."""
    try:
        status = path.stat()
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConnectionFileError(
            f"no server has written {path}: start one with `rlalign serve MODEL`, or give the "
            "name that it was started with (rollout.server.name)"
        ) from None
    except (OSError, ValueError) as error:
        raise ConnectionFileError(f"{path} cannot be read: {error}") from error
    if status.st_mode & 0o077:
        raise ConnectionFileError(
            f"{path} can be read by others (mode {status.st_mode & 0o777:o}), and so can the tokens"
            " in it: stop the server, delete the file, and start the server again"
        )
    return content


def connection_path(name: str) -> Path:
    """Where the server `name` says how to reach it; a name with a slash is the path itself."""
    if "/" in name:
        return Path(name).expanduser()
    root = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("RLALIGN_CACHE")
    folder = Path(root) if root else Path("~/.cache").expanduser()
    return folder / "rlalign" / "servers" / f"{name}.json"
