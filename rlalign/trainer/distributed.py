"""The processes of one job: who they are, and how they exchange bytes and sums.

A `World` says which process this is and on which device it computes. Every exchange has a name and
a deadline, so a lost peer ends as an error that says what was being waited for, never as a silent
hang. Payloads are bytes (nothing is pickled), and with one process every exchange is the identity,
so the same training loop serves one process and many.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlalign.errors import RlalignError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class DistributedError(RlalignError):
    """Processes could not join, or one did not answer in time; the message names the exchange."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size` processes.

    >>> World(rank=1, size=2, local_rank=1, device=torch.device("cuda", 1), timeout_s=600.0)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_s: float = 600.0  # deadline of one exchange, seconds

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def all_gather_bytes(self, payload: bytes, name: str) -> list[bytes]:
        """`payload` of every process, in rank order, on every process. Lengths may differ.

        Raises DistributedError, naming the exchange, when a peer fails or the deadline passes.
        """
        if self.size == 1:
            return [payload]
        length = torch.tensor([len(payload)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        self._wait(name, lambda: dist.all_gather(lengths, length, async_op=True))
        widest = max(1, max(int(n) for n in lengths))
        mine = _to_tensor(payload, widest).to(self.device)
        blocks = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(name, lambda: dist.all_gather(blocks, mine, async_op=True))
        return [
            block[: int(n)].cpu().numpy().tobytes()
            for block, n in zip(blocks, lengths, strict=True)
        ]

    def broadcast_bytes(self, payload: bytes | None, name: str, source: int = 0) -> bytes:
        """The `payload` of process `source` on every process; the others pass None."""
        if self.rank == source and payload is None:
            raise DistributedError(f"{name}: rank {source} is the source and must pass bytes")
        if self.size == 1:
            assert payload is not None
            return payload
        mine = payload if self.rank == source and payload is not None else b""
        length = torch.tensor([len(mine)], device=self.device)
        self._wait(name, lambda: dist.broadcast(length, source, async_op=True))
        block = _to_tensor(mine, max(1, int(length))).to(self.device)
        self._wait(name, lambda: dist.broadcast(block, source, async_op=True))
        return block[: int(length)].cpu().numpy().tobytes()

    def all_reduce_sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum of `tensor` over the processes, a new tensor of its shape, dtype and device."""
        return self._reduce(tensor, dist.ReduceOp.SUM, name)

    def all_reduce_max(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Elementwise maximum over the processes, as a new tensor."""
        return self._reduce(tensor, dist.ReduceOp.MAX, name)

    def barrier(self, name: str) -> None:
        """Return once every process has reached this point."""
        self.all_reduce_sum(torch.zeros(1, device=self.device), name)

    @contextmanager
    def agreed(self, name: str) -> Iterator[None]:
        """Every process runs a block of its own, without exchanges in it; an error in one of them
        is an error in all: its own there, DistributedError with its words on the others."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # raised again below, once the others know
            failure = error
        words = "" if failure is None else f"{type(failure).__name__}: {failure}"
        said = self.all_gather_bytes(words.encode(), name)
        if failure is not None:
            raise failure
        failures = [f"rank {r}: {text.decode()}" for r, text in enumerate(said) if text]
        if failures:
            raise DistributedError(f"{name} failed on {'; '.join(failures)}")

    def _reduce(self, tensor: torch.Tensor, op: Any, name: str) -> torch.Tensor:
        if self.size == 1:
            return tensor.clone()
        total = tensor.detach().to(self.device, copy=True)
        self._wait(name, lambda: dist.all_reduce(total, op, async_op=True))
        return total.to(tensor.device)

    def _wait(self, name: str, start: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            start().wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise DistributedError(
                f"rank {self.rank} of {self.size} waited {time.monotonic() - began:.1f} s for "
                f"`{name}` (deadline {self.timeout_s:g} s) and a peer did not answer: {error}. "
                "Look for the first error among the other processes' output."
            ) from error


@contextmanager
def joined_world(device: str = "auto", timeout_s: float = 600.0):
    """Join the job that `torchrun` or `deepspeed` started, or be a world of one; leave at the end.

    `device`: cpu, cuda, or auto (cuda where there is one). Yields the World. Raises
    DistributedError when the launcher's variables are incomplete, a device is missing, or the
    others do not show up in time.
    """
    world = _world_from_environment(device, timeout_s)
    ours = world.size > 1 and not dist.is_initialized()
    if ours:
        _join(world)
    if world.size > 1:
        ensure_process_group(world)
    try:
        yield world
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def _world_from_environment(device: str, timeout_s: float) -> World:
    given = [name for name in LAUNCHER_VARIABLES if os.environ.get(name)]
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size > 1 and len(given) < len(LAUNCHER_VARIABLES):
        missing = ", ".join(name for name in LAUNCHER_VARIABLES if name not in given)
        raise DistributedError(
            f"WORLD_SIZE is {size} but {missing} is not set: start with `torchrun` or `deepspeed`, "
            "or unset WORLD_SIZE for a single process."
        )
    rank, local_rank = (
        (int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])) if size > 1 else (0, 0)
    )
    return World(rank, size, local_rank, _device(device, local_rank), timeout_s)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DistributedError(f"device {name!r} was asked for and this machine has no usable GPU")
    if local_rank >= torch.cuda.device_count():
        raise DistributedError(
            f"local rank {local_rank} needs GPU {local_rank}, but there are only "
            f"{torch.cuda.device_count()}: start no more processes than GPUs."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def ensure_process_group(world: World) -> None:
    """Make sure that torch.distributed runs with just `world`'s processes, also for a world of one.

    Raises DistributedError when it runs already with another number of them.
    """
    if not dist.is_initialized() and world.size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        timeout = timedelta(seconds=world.timeout_s)
        _start_group(world, store=store, rank=0, world_size=1, timeout=timeout)
    if not dist.is_initialized() or dist.get_world_size() != world.size:
        found = dist.get_world_size() if dist.is_initialized() else 0
        raise DistributedError(
            f"the process group has {found} processes and the run {world.size}: enter "
            "`joined_world` before anything else starts torch.distributed."
        )


def _start_group(world: World, **options: Any) -> None:
    # torch._dynamo keeps a reference to the group that it finds when it is imported, which the
    # first use of a custom operator does. A group that outlives `destroy_process_group` has threads
    # that race with the end of the interpreter: the process may abort after its work is done.
    importlib.import_module("torch._dynamo")
    dist.init_process_group(_backend(world), **options)


def _backend(world: World) -> str:
    return "gloo" if world.device.type == "cpu" else "cpu:gloo,cuda:nccl"


def _join(world: World) -> None:
    try:
        _start_group(world, timeout=timedelta(seconds=world.timeout_s))
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DistributedError(
            f"rank {world.rank} of {world.size} could not join the others at {address} within "
            f"{world.timeout_s:g} s: {error}"
        ) from error


def _to_tensor(payload: bytes, length: int) -> torch.Tensor:
    padded = bytearray(payload.ljust(length, b"\0"))
    return torch.frombuffer(padded, dtype=torch.uint8)
