"""The worker process: builds one reward function and scores what the trainer sends, until the
trainer goes away.

Started by `rlalign.rewards.worker` as a plain script (rlalign/process.py). It must start fast, so
it imports the standard library, `channel`, `process`, `call` and `verdict` only.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    sock_fd, lifeline_fd, path = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    sys.path[:] = path

    from rlalign.channel import Channel
    from rlalign.process import die_with_parent
    from rlalign.rewards.call import takes, traceback_tail
    from rlalign.rewards.verdict import RewardError

    die_with_parent(lifeline_fd)
    channel = Channel(socket.socket(fileno=sock_fd))
    setup = channel.receive()
    if setup["max_memory_bytes"]:
        limit_memory(setup["max_memory_bytes"])
    try:
        function = build(setup)
        getattr(function, "load", lambda: None)()
        accepted = takes(function)
    except RewardError as error:
        return channel.send({"error": str(error)})
    except Exception:  # the user's module or factory may raise anything; the trainer reports it
        return channel.send({"error": f"could not be built:\n{traceback_tail()}"})
    channel.send(
        {
            "named": sorted(accepted.named),
            "required": accepted.required,
            "anything": accepted.anything,
        }
    )
    with asyncio.Runner() as runner:
        serve(channel, function, setup["rowwise"], runner)


def limit_memory(max_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def build(setup: dict[str, Any]) -> Callable[..., Any]:
    from rlalign.rewards.call import bind, resolve

    return bind(resolve(setup["target"]), setup["params"], name=setup["name"])


def serve(channel: Any, function: Callable[..., Any], rowwise: bool, runner: Any) -> None:
    """Answer requests. Row by row, so that the trainer knows which row hangs, or all at once."""
    from rlalign.rewards.call import invoke

    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        arguments, num_rows = request["arguments"], request["num_rows"]
        if rowwise:
            for i in range(num_rows):
                row = {name: [values[i]] for name, values in arguments.items()}
                reply(channel, invoke(function, row, 1, runner))
        else:
            reply(channel, invoke(function, arguments, num_rows, runner))


def reply(channel: Any, verdicts: list[Any]) -> None:
    channel.send({"verdicts": [(v.kind, v.value, v.detail) for v in verdicts]})


if __name__ == "__main__":
    main()
