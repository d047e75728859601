"""The kernels as shipped, compiled for GPUs that need not be there: they fit, spill nothing, and
use the matrix units."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlalign.kernels import triton_kernels
from rlalign.kernels.tiles import tile_candidates

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What a block may have: A100, RTX 30 (and 40), H100, B200, RTX 50.
SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376}
MATRIX_UNITS = {
    80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"
}  # fmt: skip
KERNELS = {
    "forward": triton_kernels.partials_kernel,
    "backward": triton_kernels.grad_logits_kernel,
    "fused": triton_kernels.fused_grad_kernel,
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def source(kernel, tiles, dtype, **flags):
    """The kernel with the types and constants of a launch on aligned, large inputs."""
    name, options = TYPES[dtype], {"ENTROPY": True, "HAS_BIAS": False, "SOFTCAP": False} | flags
    lora, filtered = options.pop("LORA", False), options.pop("FILTERED", False)
    descriptor = "tensordesc<{}[{},{}]>"
    matrix = {
        "hidden": descriptor.format(name, tiles.rows, tiles.depth),
        "weight": descriptor.format(name, tiles.cols, tiles.depth),
    }
    pointers = {x: f"*{name}" for x in ("hidden", "weight", "bias", "lora_hidden", "lora_weight")}
    types = pointers | (matrix if tiles.tma else {})
    types |= {"out": f"*{name}" if kernel is KERNELS["backward"] else "*fp32", "target": "*i64"}
    types |= {x: "*fp32" for x in ("lse", "mean", "grad_logp", "grad_entropy")}
    gradients = [f"d_{x}" for x in pointers]
    types |= {x: "*fp32" for x in ("threshold", *gradients)} | {"order": "*i32"}
    types |= {x: "fp32" for x in ("factor", "softcap", "inv_temperature", "slope")}
    constants = options | {
        "GROUP": tiles.group, "BN": tiles.rows, "BV": tiles.cols, "BD": tiles.depth, "SPLITS": 8,
        "BR": 16 if lora else 0, "PROMOTE": tiles.promote, "TMA": tiles.tma, "UPCAST": False,
        "LSE": False, "PRECISION": "ieee", "INTERPRETED": False, "grad_lse": None,
        "FILTER_HIDDEN": filtered, "FILTER_WEIGHT": filtered,
    }  # fmt: skip
    absent = [] if filtered else ["order", "threshold"]
    absent += [] if options["HAS_BIAS"] else ["bias", "d_bias"]
    low_rank = ("lora_hidden", "lora_weight", "d_lora_hidden", "d_lora_weight")
    constants |= dict.fromkeys(absent + ([] if lora else list(low_rank)))
    names = kernel.arg_names
    constants = {x: value for x, value in constants.items() if x in names}
    signature = {x: "constexpr" if x in constants else types.get(x, "i32") for x in names}
    multiples = {"num_cols", "width", "stride_h", "stride_w", "stride_out", "first_col", "last_col"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(names)
        if signature[x].startswith("*") or x in multiples
    }
    return ASTSource(kernel, signature, constants, aligned)


def build(kernel, capability, tiles, dtype=torch.bfloat16, **flags):
    return triton.compile(
        source(kernel, tiles, dtype, **flags),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "enable_fp_fusion": True,
        },
    )


def spilled_bytes(compiled, tmp_path) -> int:
    """Local memory that the finished machine code uses, per thread."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return max(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", report))


def shipped(capability: int, kernel: str, dtype: torch.dtype = torch.bfloat16):
    return tile_candidates(kernel, capability, dtype)[0]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_shipped_tiles_fit_and_use_the_matrix_units(capability, direction, tmp_path):
    tiles = shipped(capability, direction)
    compiled = build(KERNELS[direction], capability, tiles)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert MATRIX_UNITS[capability] in compiled.asm["ptx"]
    assert ("cp.async.bulk.tensor" in compiled.asm["ptx"]) == tiles.tma
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("filtered", [False, True])
def test_the_fused_backward_fits_and_uses_the_matrix_units(capability, filtered, tmp_path):
    tiles = shipped(capability, "fused")
    tiles = tiles._replace(tma=tiles.tma and not filtered)
    flags = {"ENTROPY": not filtered, "FILTERED": filtered}
    compiled = build(KERNELS["fused"], capability, tiles, **flags)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert MATRIX_UNITS[capability] in compiled.asm["ptx"]
    # four numbers in one addition, from Hopper on
    assert re.search(r"red\.global\.gpu\.relaxed\.add\.(v4\.)?f32", compiled.asm["ptx"])
    assert spilled_bytes(compiled, tmp_path) <= (8 if filtered else 0)


@pytest.mark.parametrize("direction", KERNELS)
def test_every_option_at_once_compiles_for_hopper(direction, tmp_path):
    """Bias, softcap and an adapter, through pointers: what inputs that are not aligned take."""
    tiles = shipped(90, direction)._replace(tma=False)
    compiled = build(KERNELS[direction], 90, tiles, HAS_BIAS=True, SOFTCAP=True, LORA=True)
    assert compiled.metadata.shared <= SHARED_BYTES[90]
    assert MATRIX_UNITS[90] in compiled.asm["ptx"]


@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_float32_compiles(capability, direction):
    tiles = shipped(capability, direction, torch.float32)
    compiled = build(KERNELS[direction], capability, tiles, torch.float32)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
