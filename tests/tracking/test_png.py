"""A PNG that is written here is the image that any other program reads."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch

from rlalign.tracking.png import data_uri, encode_png, image_grid


def decoded(png: bytes) -> np.ndarray:
    """Pixel by pixel from the specification: filters 0 to 2, 8 bit, grey or RGB."""
    assert png[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    at, chunks = 8, []
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        name, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", png[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(name + data)
        chunks.append((name, data))
        at += 12 + length
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, bits, colour, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (bits, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    raw, stride = zlib.decompress(chunks[1][1]), width * channels
    rows: list[list[int]] = []
    for y in range(height):
        kind, *line = raw[y * (stride + 1) : (y + 1) * (stride + 1)]
        for x in range(stride):
            left = line[x - channels] if x >= channels else 0
            above = rows[-1][x] if rows else 0
            line[x] = (line[x] + {0: 0, 1: left, 2: above}[kind]) % 256
        rows.append(line)
    return np.array(rows, dtype=np.uint8).reshape(height, width, channels)


def images():
    noise = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    across = np.tile(np.arange(0, 240, 3, dtype=np.uint8), (40, 1))  # best told by its left
    return [
        noise,
        noise[..., 0],
        across,
        across.T.copy(),
        np.stack([across] * 3, -1),
        noise[:1, :1],
    ]


@pytest.mark.parametrize("pixels", images(), ids=lambda pixels: "x".join(map(str, pixels.shape)))
def test_what_is_written_is_read_back(pixels):
    png = encode_png(pixels)
    assert (decoded(png).squeeze(-1) if pixels.ndim == 2 else decoded(png)).tolist() == (
        pixels.tolist()
    )


@pytest.mark.parametrize("pixels", images(), ids=lambda pixels: "x".join(map(str, pixels.shape)))
def test_pillow_reads_the_same(pixels):
    pillow = pytest.importorskip("PIL.Image")
    image = pillow.open(io.BytesIO(encode_png(pixels)))
    assert image.mode == ("L" if pixels.ndim == 2 else "RGB")
    assert np.asarray(image).tolist() == pixels.tolist()


def test_smooth_images_are_smaller_than_their_bytes_deflated():
    y, x = np.mgrid[:64, :64]
    waves = np.stack([128 + 100 * np.sin(x / 9 + y / 13 + c) for c in range(3)], -1)
    pixels = waves.astype(np.uint8)
    assert len(encode_png(pixels)) < 0.7 * len(zlib.compress(pixels.tobytes(), 9))


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 2), dtype=np.float32),
        np.zeros((2, 2, 4), dtype=np.uint8),
        np.zeros((0, 2), dtype=np.uint8),
    ],
    ids=["float", "alpha", "empty"],
)
def test_what_is_no_image_is_refused(pixels):
    with pytest.raises(ValueError, match="PNG"):
        encode_png(pixels)


def test_a_data_uri_holds_the_image_rounded_and_clipped():
    image_CHW = torch.tensor([[[0.0, 1.0, 0.5], [-3.0, 7.0, float("nan")]]])
    head, body = data_uri(image_CHW).split(",")
    assert head == "data:image/png;base64"
    pixels = decoded(base64.b64decode(body))[..., 0].tolist()
    assert pixels == [[0, 255, 128], [0, 255, 0]]


def test_a_data_uri_keeps_channels_apart():
    level_CHW = torch.arange(72).view(3, 4, 6)
    pixels = decoded(base64.b64decode(data_uri((level_CHW / 255).requires_grad_()).split(",")[1]))
    for c, y, x in [(0, 0, 0), (1, 3, 2), (2, 1, 5)]:
        assert pixels[y, x, c] == 24 * c + 6 * y + x


def test_a_grid_has_every_image_in_its_place_and_nothing_but_background_elsewhere():
    parts = [torch.full((1, 2, 3), 0.1 * i) for i in range(1, 6)]
    grid = image_grid(parts, columns=3, gap=2, background=0.9)[0].tolist()
    for y, row in enumerate(grid):
        for x, pixel in enumerate(row):
            index = y // 4 * 3 + x // 5
            inside = y % 4 < 2 and x % 5 < 3 and index < 5
            assert pixel == pytest.approx(0.1 * (index + 1) if inside else 0.9)
    assert (len(grid), len(grid[0])) == (2 * 2 + 2, 3 * 3 + 2 * 2)


def test_fewer_images_than_columns_leave_no_empty_columns():
    assert image_grid([torch.zeros(3, 2, 2)] * 2, columns=9, gap=1).shape == (3, 2, 5)
    assert image_grid([torch.ones(1, 2, 2)] * 4, columns=2, gap=0).eq(1).all()


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 images"):
        image_grid([], columns=2)
    with pytest.raises(ValueError, match="0 columns"):
        image_grid([torch.zeros(1, 2, 2)], columns=0)
