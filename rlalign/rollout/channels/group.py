"""Weights by broadcast in a process group of two: the trainer (rank 0) and the engine.

NCCL between GPUs, Gloo between CPUs. The trainer listens on the address from which it reaches the
server; names, types and shapes go through that store and values through the group, tensor by
tensor, so nothing is gathered on either side. Neither is encrypted or asks who is there: this is
for networks, and machines, that are yours alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from rlalign.rollout.channels import Post, Receipt, Weights
from rlalign.rollout.engine import EngineError

dist: Any = torch.distributed  # its stubs leave out most of what is used here

BACKENDS = ("gloo", "nccl")
POLL_S = 0.002
TIMEOUT = timedelta(seconds=120)  # for one weight to go from one side to the other
CONNECT_TIMEOUT = timedelta(seconds=10)
BROKEN_OFF = b"broken off"
HERE, KEPT, NEW = "here", b"kept", b"new"  # the engine has come; it has the group, or has not


class GroupChannel:
    """`host` is this machine's address as the engine sees it."""

    def __init__(self, backend: str, host: str) -> None:
        _check_backend(backend)
        self._backend, self._host = backend, host
        listener = socket.create_server((host, 0))
        self._port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            self._port,
            is_master=True,
            timeout=TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # or it would listen on every address
        )
        self._group: Any = None
        self._name = ""  # of the group: the update for which it was formed

    def send(self, weights: Weights, version: int, post: Post) -> Receipt:
        update = secrets.token_hex(16)
        where = {"backend": self._backend, "port": self._port, "group": self._name}
        posting = _Posting(post, {"channel": "group", **where, "update": update})
        store, count = dist.PrefixStore(update, self._store), 0
        try:
            self._meet(store, update, posting)
            for name, tensor in weights:
                described = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
                value = _movable(tensor.detach(), self._backend)
                with _torchs_errors():
                    store.set(str(count), json.dumps(described))
                    self._group.broadcast(value, 0).wait(TIMEOUT)
                count += 1
            store.set(str(count), "")
        except _PostFailed:
            pass
        except _GroupFailed as error:
            self.close()
            posting.result()  # the server knows better what broke, if it says anything
            raise EngineError(f"sending weights by {self._backend} failed: {error}") from error
        except BaseException:  # the sender's own
            store.set(str(count), BROKEN_OFF)
            with contextlib.suppress(EngineError):
                posting.result()
            raise
        receipt = posting.result()
        for key in (HERE, *map(str, range(count + 1))):
            store.delete_key(key)
        return receipt

    def close(self) -> None:
        self._group, self._name = None, ""

    def _meet(self, store: Any, update: str, posting: _Posting) -> None:
        """Wait for the engine to come, then form the group with it unless both have it."""
        while not store.check([HERE]):
            if not posting.waits:
                raise _PostFailed
            time.sleep(POLL_S)
        if store.get(HERE) == NEW:
            self.close()
            with _torchs_errors():
                self._group = _group(store, 0, self._backend, self._host)
            self._name = update


class GroupReceiver:
    """The engine's end. Groups are kept from one update to the next."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._group: Any = None
        self._name = ""

    def receive(self, source: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of an update that `GroupChannel.send` announced. What a reader that leaves
        early has not read is received and dropped, so that the sender is not kept waiting."""
        _check_backend(source["backend"])
        try:
            with _torchs_errors():
                update = self._join(source)
            rest = self._tensors(update, source["backend"])
            try:
                # Not `yield from`: a reader that leaves would close it too.
                for weight in rest:  # noqa: UP028
                    yield weight
            finally:
                for _ in rest:
                    pass
        except _GroupFailed as error:
            self._group, self._name = None, ""
            raise EngineError(f"receiving weights by {source['backend']}: {error}") from error

    def _join(self, source: dict[str, Any]) -> Any:
        store = dist.TCPStore(
            source["host"], source["port"], timeout=CONNECT_TIMEOUT, wait_for_workers=False
        )
        store.set_timeout(TIMEOUT)
        update = dist.PrefixStore(source["update"], store)
        kept = bool(self._name) and self._name == source["group"]
        update.set(HERE, KEPT if kept else NEW)
        if not kept:
            self._group, self._name = None, ""
            self._group = _group(update, 1, source["backend"], _address_to(source))
            self._name = source["update"]
        return update

    def _tensors(self, update: Any, backend: str) -> Iterator[tuple[str, torch.Tensor]]:
        device = "cpu" if backend == "gloo" else self._device
        for i in itertools.count():
            with _torchs_errors():
                described = update.get(str(i))
            if not described:
                return
            if described == BROKEN_OFF:
                raise EngineError("the sender broke off in the middle of an update")
            try:
                name, dtype, shape = json.loads(described)
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            except Exception as error:  # no room for it, or whoever is there is no sender of ours
                raise _GroupFailed(f"{described!r}: {error}") from error
            with _torchs_errors():
                self._group.broadcast(tensor, 0).wait(TIMEOUT)
            yield name, tensor


class _GroupFailed(Exception):
    """torch could not move something; the message is its."""


@contextlib.contextmanager
def _torchs_errors():
    try:
        yield
    except (RuntimeError, OSError, dist.DistError) as error:
        raise _GroupFailed(str(error)) from error


class _PostFailed(Exception):
    """The server answered before it had anything."""


class _Posting:
    """The request that tells the server of an update, in a thread: it is answered when everything
    has been received."""

    def __init__(self, post: Post, announcement: dict[str, Any]) -> None:
        self._answer: Receipt = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(post, announcement), name="weights-announced", daemon=True
        )
        self._thread.start()

    def _run(self, post: Post, announcement: dict[str, Any]) -> None:
        try:
            self._answer = post(announcement)
        except BaseException as error:
            self._error = error

    @property
    def waits(self) -> bool:
        """For the answer, until the request's own deadline."""
        return self._thread.is_alive()

    def result(self) -> Receipt:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answer


def _group(store: Any, rank: int, backend: str, host: str) -> Any:
    nccl = backend == "nccl"
    options = dist.ProcessGroupNCCL.Options() if nccl else dist.ProcessGroupGloo._Options()
    options._timeout = TIMEOUT
    if nccl:
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise EngineError(f"there is no backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise EngineError(
            "weights by nccl need a GPU and a torch with NCCL on both sides: use "
            "rollout.server.channel=auto"
        )


def _movable(tensor: torch.Tensor, backend: str) -> torch.Tensor:
    return (tensor.cpu() if backend == "gloo" else tensor.cuda()).contiguous()


def _address_to(source: dict[str, Any]) -> str:
    """Ours, on the way to the trainer."""
    there = source["host"], source["port"]
    with socket.create_connection(there, CONNECT_TIMEOUT.total_seconds()) as connection:
        return connection.getsockname()[0]
