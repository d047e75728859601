"""The file through which jobs find a server: where it is, and the tokens to get in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlalign.errors import RlalignError


class ConnectionFileError(RlalignError):
    """The file that says where a server is and how to get in is missing or not private."""


def refuse_if_taken(path: Path) -> None:
    """Raise ConnectionFileError where a server that lives wrote the file."""
    try:
        pid = json.loads(path.read_text())["pid"]
        os.kill(pid, 0)
    except (OSError, ValueError, KeyError, TypeError):  # no file, no process, or none of ours
        return
    raise ConnectionFileError(
        f"process {pid} serves under that name already ({path}): stop it, or give this server "
        "another one, e.g. name=second"
    )


def write_connection(path: Path, url: str, tokens: Mapping[str, str]) -> None:
    """Where the server is and how to get in, readable by its owner alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"url": url, "tokens": dict(tokens), "pid": os.getpid()}, file)
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
