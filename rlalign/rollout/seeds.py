"""Sampling seeds keyed by what is sampled, never by the order in which it is drawn.

    seed = blake2b(key = run seed; prompt id, sample index, step) mod 2^63

So a sample can be drawn again alone, on another engine or after a resume, and comes out the same.
"""

from __future__ import annotations

import hashlib


def sample_seed(seed: int, prompt_id: str, index: int, step: int) -> int:
    """The seed, in [0, 2^63), of sample `index` of prompt `prompt_id` at `step` of run `seed`.

    Integers may be anything that fits 64 signed bits; OverflowError otherwise.
    """
    # The prompt id comes last: the other fields have a fixed width, so no two keys read alike.
    message = _int64(index) + _int64(step) + prompt_id.encode()
    digest = hashlib.blake2b(message, digest_size=8, key=_int64(seed)).digest()
    return int.from_bytes(digest, "little") >> 1


def _int64(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)
