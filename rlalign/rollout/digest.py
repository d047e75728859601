"""A digest of named tensors, computed where each tensor lives, whatever the order they come in.

A tensor is read as 64-bit words x_i (the last one filled up with zero bytes), and

    sum(tensor) = sum_i w_i * (x_i ^ (x_i >> 29))  mod 2^64
    digest = blake2b(sorted (name, dtype, shape, sum))

(multilinear hashing: Carter and Wegman, 1979). The weights w_i are odd, so one changed word always
changes the sum; they are hashes of the position, so words that trade places change it too; the
shift carries sign bits down, where a factor cannot push them out of the word. Integer sums are
exact in any order, so a CPU, a GPU and any chunking agree. It guards against faults, not against
an adversary.

Shapes: R rows of C words each; w = row weight * column weight.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator

import torch

COLUMNS = (
    1 << 15
)  # words in a row: 256 KiB, so that a row and its scratch stay in a core's L2 cache
CPU_ROWS = 1
ACCELERATOR_ROWS = 256  # 64 MiB at a time: few kernel launches, bounded scratch
FOLD = 29
FOLD_MASK = (
    1 << (64 - FOLD)
) - 1  # torch shifts int64 arithmetically: cut off the copies of the sign
MULTIPLIER = -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9 of splitmix64, as a signed word
GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed word


class WeightDigest:
    """The digest of a stream of named tensors.

    >>> digest = WeightDigest()
    >>> digest.add("embed.weight", torch.zeros(2, 3))
    >>> digest.add("head.weight", torch.ones(2, 3))
    >>> digest.hexdigest()
    'fe40b976496eec4b'
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, tuple[int, ...], torch.Tensor]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in one tensor of any dtype and device; it may be changed or freed afterwards.

        ValueError if `name` was added before.
        """
        if name in self._entries:
            raise ValueError(f"weight {name!r} was added to the digest twice; send each name once")
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._entries[name] = (dtype, tuple(tensor.shape), _word_sum(tensor.detach()))

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        entries = [
            [name, dtype, shape, int(total)]
            for name, (dtype, shape, total) in sorted(self._entries.items())
        ]
        return hashlib.blake2b(json.dumps(entries).encode(), digest_size=8).hexdigest()


def digest_of(parameters: dict[str, torch.Tensor]) -> str:
    """The digest of a whole state dict at once."""
    digest = WeightDigest()
    for name, tensor in parameters.items():
        digest.add(name, tensor)
    return digest.hexdigest()


def _word_sum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 scalar on the tensor's own device: the weighted sum of its words."""
    words = _words(tensor)
    weight_C = _column_weights(str(words.device))
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for first_row, word_RC in _blocks(words):
        weight_R = _weights(-1 - first_row - torch.arange(len(word_RC), device=words.device))
        sum_R = _fold(word_RC).mul_(weight_C[: word_RC.shape[1]]).sum(1)
        total += sum_R.mul_(weight_R).sum()
    return total


def _blocks(words: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of at most `rows` full rows at a time; the last row may be short."""
    rows = CPU_ROWS if words.device.type == "cpu" else ACCELERATOR_ROWS
    full = words.numel() // COLUMNS
    word_RC = words[: full * COLUMNS].view(full, COLUMNS)
    for first_row in range(0, full, rows):
        yield first_row, word_RC[first_row : first_row + rows]
    if words.numel() % COLUMNS:
        yield full, words[None, full * COLUMNS :]


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as int64 words: a view where its size and alignment allow it."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    if raw.numel() % 8:
        raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8))
    elif raw.storage_offset() % 8:
        raw = raw.clone()
    return raw.view(torch.int64)


def _fold(word: torch.Tensor) -> torch.Tensor:
    """x ^ (x >> 29), a bijection of 64-bit words."""
    folded = word >> FOLD
    folded &= FOLD_MASK
    folded ^= word
    return folded


def _weights(position: torch.Tensor) -> torch.Tensor:
    """An odd pseudo-random int64 word for each position."""
    return _fold(_fold(position * GOLDEN) * MULTIPLIER) | 1


@functools.lru_cache(maxsize=8)
def _column_weights(device: str) -> torch.Tensor:
    return _weights(torch.arange(COLUMNS, device=device))
