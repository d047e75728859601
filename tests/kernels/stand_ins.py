"""Stand-ins for what surrounds a kernel: its launcher, the other processes."""

from __future__ import annotations

import torch

from tests.kernels.cases import BACKEND


def count_launches(monkeypatch, times=1):
    """Every launch of a Triton kernel from now on is done `times` times; returns the list of their
    grids, which grows."""
    grids = []
    if BACKEND != "triton":
        return grids
    from rlalign.kernels import triton_kernels

    class Launcher:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(**arguments):
                for _ in range(times):
                    grids.append(grid)
                    self.kernel[grid](**arguments)

            return launch

    for name in ("partials_kernel", "grad_logits_kernel"):
        monkeypatch.setattr(triton_kernels, name, Launcher(getattr(triton_kernels, name)))
    return grids


class Processes:
    """torch.distributed as `op` uses it, for processes that take turns in this one: what the others
    gave is remembered from a round before, and sums are left to the framework."""

    group_name = "processes that take turns"

    def __init__(self, size, rows):
        self.rank, self.sums = 0, 0
        self.given = list(torch.zeros(size, 4, rows))

    def get_world_size(self, group):
        return len(self.given)

    def all_gather(self, everyone, mine, group):
        self.given[self.rank] = mine.clone()
        for slot, part in zip(everyone, self.given, strict=True):
            slot.copy_(part)

    def all_reduce(self, grad, group):
        self.sums += 1
