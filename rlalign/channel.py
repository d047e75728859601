"""Length-prefixed JSON over a socket pair, with deadlines: how a process and its worker talk."""

from __future__ import annotations

import errno
import json
import select
import socket
import struct
import time
from typing import Any

HEADER = struct.Struct("!Q")
MAX_FRAME_BYTES = 1 << 30


class Channel:
    """One end. `deadline` is a `time.monotonic()` instant; None waits for ever.

    `receive` raises EOFError when the other end is gone or this one was closed meanwhile, by some
    other thread; TimeoutError past the deadline.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, message: dict[str, Any], deadline: float | None = None) -> None:
        self.send_bytes(json.dumps(message).encode(), deadline)

    def send_bytes(self, body: bytes, deadline: float | None = None) -> None:
        """Send JSON that is encoded already."""
        self._arm(deadline)
        self._sock.sendall(HEADER.pack(len(body)) + body)

    def receive(self, deadline: float | None = None) -> dict[str, Any]:
        (size,) = HEADER.unpack(self._read(HEADER.size, deadline))
        if size > MAX_FRAME_BYTES:
            raise EOFError(f"the other end announced a message of {size} bytes: not our protocol")
        return json.loads(self._read(size, deadline))

    def ready(self, wait_s: float) -> bool:
        """Whether the next message has begun to arrive, after `wait_s` at most."""
        return bool(select.select([self._sock], [], [], wait_s)[0])

    def close(self) -> None:
        self._sock.close()

    def _read(self, size: int, deadline: float | None) -> bytes:
        buffer = bytearray()
        while len(buffer) < size:
            self._arm(deadline)
            try:
                chunk = self._sock.recv(min(size - len(buffer), 1 << 20))
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise EOFError("this end of the connection was closed") from error
                raise
            if not chunk:
                raise EOFError("the other end closed the connection")
            buffer += chunk
        return bytes(buffer)

    def _arm(self, deadline: float | None) -> None:
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError("deadline passed")
        self._sock.settimeout(remaining)
