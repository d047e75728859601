"""A world of one, and how joining fails. Exchanges between processes: test_ranks.py."""

import os
import re
import subprocess
import sys

import pytest
import torch

from rlalign.trainer.distributed import (
    LAUNCHER_VARIABLES,
    DistributedError,
    World,
    ensure_process_group,
    joined_world,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_world_of_one_needs_no_process_group_and_every_exchange_is_the_identity():
    with joined_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        tensor = torch.tensor([1.5, -2.0])
        total = world.all_reduce_sum(tensor, "sum")
        assert torch.equal(total, tensor) and total is not tensor
        assert torch.equal(world.all_reduce_max(tensor, "max"), tensor)
        assert world.all_gather_bytes(b"abc", "bytes") == [b"abc"]
        assert world.broadcast_bytes(b"", "nothing") == b""
        world.barrier("end")


def test_the_source_of_a_broadcast_must_have_bytes():
    with pytest.raises(DistributedError, match="weights"):
        World().broadcast_bytes(None, "weights")


def test_incomplete_launcher_variables_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DistributedError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        joined_world("cpu").__enter__()


JOIN = """
from rlalign.trainer.distributed import DistributedError, joined_world
try:
    joined_world("cpu", timeout_s=1.0).__enter__()
except DistributedError as error:
    print(error)
"""


def test_peers_that_never_come_are_an_error_within_the_deadline():
    address = ("1", "2", "1", "127.0.0.1", "9")  # nobody listens there
    launcher = dict(zip(LAUNCHER_VARIABLES, address, strict=True))
    run = subprocess.run(
        [sys.executable, "-c", JOIN],
        env={**os.environ, **launcher},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.search(r"rank 1 of 2 .* 127\.0\.0\.1:9 within 1 s", run.stdout), run


def test_a_process_group_of_another_size_is_an_error():
    ensure_process_group(World())
    ensure_process_group(World())
    with pytest.raises(DistributedError, match="has 1 processes and the run 2"):
        ensure_process_group(World(rank=0, size=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(DistributedError, match="no usable GPU"):
        joined_world("cuda").__enter__()
