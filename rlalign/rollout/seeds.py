"""Seeds keyed by what is sampled, never by the order in which it is drawn.

    completion   seed = blake2b(key = run seed; index, step, prompt id) mod 2^63
    noise        key  = blake2b(key = run seed, person "flow-noise"; tree, iteration, time, prompt
                                id), 128 bits
    masks        seed = as a completion's, person "masks"; index, step, iteration, prompt id
    latents      seed = as a completion's, person "latents"; step, prompt id
    segment      seed = as a completion's, person "segment"; its name in the tree, tree, step, id
    RAIN         seed = as a completion's, person "rain"; tree, node, kind, index, prompt id

So a sample can be drawn again alone, on another engine or after a resume, and comes out the same.
"""

from __future__ import annotations

import hashlib


def sample_seed(seed: int, prompt_id: str, index: int, step: int) -> int:
    """The seed, in [0, 2^63), of sample `index` of prompt `prompt_id` at `step` of run `seed`.

    Integers may be anything that fits 64 signed bits; OverflowError otherwise.
    """
    return int.from_bytes(_digest(8, seed, (index, step), prompt_id), "little") >> 1


def noise_key(seed: int, prompt_id: str, tree: int, iteration: int, time: int) -> int:
    """The key, in [0, 2^128), of all noise that tree `tree` of prompt `prompt_id` needs at
    denoising step `time` of training iteration `iteration`. OverflowError as for `sample_seed`."""
    digest = _digest(16, seed, (tree, iteration, time), prompt_id, person=b"flow-noise")
    return int.from_bytes(digest, "little")


def mask_seed(seed: int, prompt_id: str, index: int, step: int, iteration: int) -> int:
    """The seed, in [0, 2^63), of the masks under which a sample's log-prob is estimated in pass
    `iteration` over the batch of `step`."""
    digest = _digest(8, seed, (index, step, iteration), prompt_id, person=b"masks")
    return int.from_bytes(digest, "little") >> 1


def latent_seed(seed: int, prompt_id: str, step: int) -> int:
    """The seed, in [0, 2^63), of what step `step` of a search over latents draws."""
    return int.from_bytes(_digest(8, seed, (step,), prompt_id, person=b"latents"), "little") >> 1


def _digest(
    size: int, seed: int, fields: tuple[int, ...], prompt_id: str, person: bytes = b""
) -> bytes:
    # The prompt id comes last: what is before it has a known width, so no two keys read alike.
    message = b"".join(map(_int64, fields)) + prompt_id.encode()
    return hashlib.blake2b(message, digest_size=size, key=_int64(seed), person=person).digest()


def segment_seed(seed: int, prompt_id: str, tree: int, name: tuple[int, ...], step: int) -> int:
    """The seed, in [0, 2^63), of the segment `name` of tree number `tree`: see tree_rollout.py.

    That of the first segment, (0,), is the seed of flat sample `tree`: a tree that never branches
    is that sample.
    """
    if name == (0,):
        return sample_seed(seed, prompt_id, tree, step)
    fields = (len(name), *name, tree, step)
    return int.from_bytes(_digest(8, seed, fields, prompt_id, person=b"segment"), "little") >> 1


def rain_seed(seed: int, prompt_id: str, tree: int, node: int, kind: int, index: int) -> int:
    """The seed, in [0, 2^63), of draw number `index` of a kind (candidates, rollouts) at node
    number `node` of a search's tree."""
    digest = _digest(8, seed, (tree, node, kind, index), prompt_id, person=b"rain")
    return int.from_bytes(digest, "little") >> 1


def _int64(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)
