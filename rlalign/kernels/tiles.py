"""How the Triton kernels are cut: tile sizes by device, and what is done where they do not fit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

T = TypeVar("T")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it decorates
AUTOTUNE_VARIABLE = "RLALIGN_KERNEL_AUTOTUNE"


class Tiles(NamedTuple):
    """How one kernel is cut: rows, columns and depth of a tile, row blocks that run together, and
    the steps of depth after which the matrix units' accumulator is emptied (0: at the end)."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 16
    promote: int = 0
    tma: bool = False


class TileTable(NamedTuple):
    forward: Tiles
    backward: Tiles
    fused: Tiles


# A log-prob shall be within 2e-5, so the forward pass promotes every 320 of depth (measured on an
# H200 at logits of standard deviation 6 and depth 4096: 1.7e-5 in place of 2.2e-4, for an eighth
# more time). dL/dz is rounded to half precision anyway.
AMPERE_HALF = TileTable(
    forward=Tiles(64, 128, 64, warps=8, stages=3, promote=5),
    backward=Tiles(128, 128, 64, warps=8, stages=3),
    fused=Tiles(64, 128, 64, warps=8, stages=2),
)
AMPERE_FULL = TileTable(
    forward=Tiles(64, 64, 32, warps=4, stages=2),
    backward=Tiles(64, 64, 32, warps=4, stages=2),
    fused=Tiles(64, 64, 32, warps=8, stages=2),
)
HOPPER_HALF = TileTable(
    forward=Tiles(128, 128, 64, warps=8, stages=4, promote=5, tma=True),
    backward=Tiles(128, 256, 64, warps=8, stages=3, tma=True),
    fused=Tiles(128, 128, 64, warps=8, stages=3, tma=True),
)
HOPPER_FULL = TileTable(
    forward=Tiles(64, 128, 32, warps=4, stages=3),
    backward=Tiles(64, 128, 32, warps=4, stages=3),
    fused=Tiles(64, 64, 32, warps=8, stages=2),
)
# By compute capability, the newest first: half precision, then float32. 12.x are the graphics cards
# of the Blackwell generation, with Ampere's matrix instructions and little shared memory.
TABLES = [
    (120, AMPERE_HALF, AMPERE_FULL),
    (90, HOPPER_HALF, HOPPER_FULL),
    (80, AMPERE_HALF, AMPERE_FULL),
]
INTERPRETER_TILES = Tiles(128, 512, 256, 4, 1)

_fitting: dict[Hashable, Tiles] = {}


def run_with_tiles(kernel: str, matrix: Tensor, run: Callable[[Tiles], T]) -> T:
    """`run` with the tiles of `kernel` (a field of TileTable) for the device and dtype of `matrix`.

    `run` makes new results only, so that it may be tried: tiles that the device or the compiler has
    no room for give way to smaller ones. With $RLALIGN_KERNEL_AUTOTUNE=1 the quickest are looked
    for, once for each kernel, dtype and width. Raises RuntimeError where none fit.
    """
    if INTERPRETED:
        return run(INTERPRETER_TILES)
    candidates = tile_candidates(kernel, capability(matrix), matrix.dtype)
    key = (kernel, matrix.device, matrix.dtype, matrix.shape[-1])
    if key in _fitting:
        candidates.insert(0, _fitting[key])
    elif os.environ.get(AUTOTUNE_VARIABLE) == "1":
        candidates += [x._replace(group=8) for x in candidates]
        candidates.sort(key=lambda tiles: _seconds(run, tiles))
    problems = []
    for tiles in dict.fromkeys(candidates):
        try:
            result = run(tiles)
        except Exception as error:
            if not _lacks_room(error):
                raise
            problems.append(f"{tiles}: {error}")
        else:
            _fitting[key] = tiles
            return result
    raise RuntimeError(
        f"no tiles of the {kernel} kernel fit compute capability {capability(matrix) / 10} with "
        f"{matrix.dtype}; use backend='torch'. " + "; ".join(problems)
    )


def tile_candidates(kernel: str, capability: int, dtype: torch.dtype) -> list[Tiles]:
    """For a compute capability (times 10), the best first, then Ampere's, which are small. Raises
    RuntimeError for one before 8.0."""
    half = dtype in (torch.bfloat16, torch.float16)
    for lowest, half_table, full_table in TABLES:
        if capability >= lowest:
            tables = [half_table if half else full_table, AMPERE_HALF if half else AMPERE_FULL]
            return list(dict.fromkeys(getattr(table, kernel) for table in tables))
    raise RuntimeError(
        f"the Triton kernels need compute capability 8.0, this device has {capability / 10}; use "
        "backend='torch'"
    )


def capability(tensor: Tensor) -> int:
    """Of the tensor's device, times 10: 90 for Hopper."""
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def _lacks_room(error: Exception) -> bool:
    """Whether these tiles are at fault: too much shared memory, or a pass of the compiler that
    gives up on them."""
    unfit = (OutOfResources, PTXASError, CompilationError)
    return isinstance(error, unfit) or "PassManager" in str(error)


def _seconds(run: Callable[[Tiles], Any], tiles: Tiles) -> float:
    """Of the second call: the first one compiles."""
    try:
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(tiles)
            torch.cuda.synchronize()
    except Exception as error:
        if not _lacks_room(error):
            raise
        return math.inf
    return time.perf_counter() - start
