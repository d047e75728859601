"""Sampling seeds keyed by what is sampled, never by the order in which it is drawn.

    seed = blake2b(key = run seed; prompt id, sample index, step) mod 2^63

or, for a segment of a tree of tokens, the number of the tree and the segment's name there. So a
sample can be drawn again alone, on another engine or after a resume, and comes out the same.
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


def segment_seed(seed: int, prompt_id: str, tree: int, name: tuple[int, ...], step: int) -> int:
    """The seed, in [0, 2^63), of the segment `name` of tree number `tree`: see tree_rollout.py.

    That of the first segment, (0,), is the seed of flat sample `tree`: a tree that never branches
    is that sample.
    """
    if name == (0,):
        return sample_seed(seed, prompt_id, tree, step)
    numbers = (len(name), *name, tree, step)
    message = b"".join(map(_int64, numbers)) + prompt_id.encode()
    hashed = hashlib.blake2b(message, digest_size=8, key=_int64(seed), person=b"segment")
    return int.from_bytes(hashed.digest(), "little") >> 1


def _int64(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)
