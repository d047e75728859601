"""Images as PNG files and data URIs, with nothing but zlib: what a run's report shows.

A PNG is a signature and chunks (length, type, data, CRC of type and data): IHDR, IDAT, IEND. IDAT
is the zlib stream of all rows, each led by a byte that says how the row was filtered; the filter of
the three here that compresses best is taken for the whole image. Source: PNG specification, third
edition (W3C 2025), sections 5, 9 and 11.

Legend: C channels (1 grey, 3 RGB), H, W pixels.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPE = {1: 0, 3: 2}


def encode_png(pixels: np.ndarray) -> bytes:
    """The PNG file of uint8 `pixels`, [H, W] (grey), [H, W, 1] (grey) or [H, W, 3] (RGB).

    Raises ValueError for anything else, an empty image included.
    """
    pixels_HWC = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] not in COLOUR_TYPE:
        raise ValueError(
            f"a PNG is made of uint8 [H, W] or [H, W, 3], not of {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    height, width, channels = pixels_HWC.shape
    if not pixels_HWC.size:
        raise ValueError(f"an image of {height} x {width} pixels has no PNG")
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPE[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", _compressed_rows(pixels_HWC)), (b"IEND", b"")]
    return SIGNATURE + b"".join(_chunk(name, data) for name, data in chunks)


def data_uri(image_CHW: Tensor) -> str:
    """`image_CHW` in [0, 1], of 1 or 3 channels, as a `data:image/png;base64,...` URI.

    What lies outside the range is clipped, NaN is black. Raises ValueError as `encode_png` does.
    """
    bytes_CHW = (image_CHW.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().byte()
    png = encode_png(bytes_CHW.movedim(0, -1).cpu().numpy())
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def image_grid(
    images: Sequence[Tensor], columns: int, gap: int = 1, background: float = 1.0
) -> Tensor:
    """`images` of one shape [C, H, W] row by row in one, `gap` pixels of `background` between them
    and in the places that are left over: float32 [C, R * (H + gap) - gap, K * (W + gap) - gap]
    with K = min(columns, images) and R rows.

    Raises ValueError for no images or less than one column.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid of {len(images)} images in {columns} columns is none")
    columns = min(columns, len(images))
    channels, height, width = images[0].shape
    rows = math.ceil(len(images) / columns)
    size = (channels, rows * (height + gap), columns * (width + gap))
    grid = images[0].new_full(size, background, dtype=torch.float32)
    for i, image_CHW in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image_CHW
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


def _compressed_rows(pixels_HWC: np.ndarray) -> bytes:
    """The IDAT stream. Each filter keeps a byte's difference, modulo 256, from its neighbour."""
    left_HWC = np.pad(pixels_HWC, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    above_HWC = np.pad(pixels_HWC, ((1, 0), (0, 0), (0, 0)))[:-1]
    filtered = {0: pixels_HWC, 1: pixels_HWC - left_HWC, 2: pixels_HWC - above_HWC}
    streams = []
    for number, rows_HWC in filtered.items():
        rows = rows_HWC.reshape(len(rows_HWC), -1)
        rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=number)
        streams.append(zlib.compress(rows.tobytes(), 9))
    return min(streams, key=len)


def _chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
