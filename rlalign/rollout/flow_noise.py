"""The noise of denoising trees: keyed by where it is used, and the same however work is divided.

All that one tree needs at one denoising step is one stream of Philox, a counter-based generator,
whose 128-bit key is a hash of (run seed, iteration, prompt id, tree, step); within it rows follow
the nodes of the level from left to right, so the row IS the path of the node. No two trees share a
stream: neither micro-batches, nor the order of prompts, nor the number of processes can change a
draw. (torch.Generator on a CPU keeps 32 bits of its seed, so its streams would meet by chance.)
Noise is drawn on the CPU, which makes it the same for every device.

Siblings at a split share a part of theirs (BranchGRPO, arXiv 2509.06040, section 3):

    xi_b = (xi_0 + s eta_b) / sqrt(1 + s^2),   xi_0 one per parent, eta_b one per child, all N(0, I)

so that each xi_b is N(0, I) and two siblings correlate by rho = 1 / (1 + s^2).

Legend: P trees, W nodes of the level in each, K children of each node, X the latent's dimensions.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlalign.rollout.flow_steps import FlowError
from rlalign.rollout.seeds import noise_key

ROOT = -1  # the step whose noise is the start
EVERYONE = ""  # in place of a prompt id: noise that all trees of an iteration share

TreeKey = tuple[str, int]  # prompt id, and which of that prompt's trees: 0, 1, ...


def initial_noise(
    seed: int,
    iteration: int,
    trees: Sequence[TreeKey],
    shape: Sequence[int],
    *,
    shared: bool = False,
) -> Tensor:
    """z at sigma = 1, one per tree: float32 [P, *shape], N(0, I). `shared`: one draw for all."""
    keys = [(EVERYONE, 0)] * len(trees) if shared else trees
    return _draw(seed, iteration, ROOT, keys, shape)


def edge_noise(
    seed: int,
    iteration: int,
    time: int,
    trees: Sequence[TreeKey],
    num_parents: int,
    shape: Sequence[int],
    *,
    branch_factor: int = 1,
    corr: float = 4.0,
    mode: str = "correlated",
) -> Tensor:
    """xi of every edge out of one level: float32 [P, W, K, *shape] with W = `num_parents` and
    K = `branch_factor`.

    `time` is the denoising step, 0 and up. K > 1 makes siblings by `sibling_noise`; `corr` and
    `mode` are its s and mode. Raises FlowError as it does.
    """
    num_draws = 1 if branch_factor == 1 else 1 + branch_factor
    drawn = _draw(seed, iteration, time, trees, (num_parents, num_draws, *shape))
    if branch_factor == 1:
        return drawn
    return sibling_noise(drawn[:, :, :1], drawn[:, :, 1:], corr, mode)


def sibling_noise(xi_0: Tensor, eta_b: Tensor, corr: float, mode: str = "correlated") -> Tensor:
    """xi_b from the parent's part and the children's own, broadcast against each other.

    correlated: (xi_0 + s eta_b) / sqrt(1 + s^2); s = inf: eta_b. official_scaled: s eta_b, as the
    published code of BranchGRPO has it, whose variance is s^2 while its log-probs take it for 1.
    Raises FlowError for s = 0 (siblings would be equal), a negative s, and an unknown mode.
    """
    if mode not in ("correlated", "official_scaled"):
        raise FlowError(f"branch_noise={mode!r} is neither correlated nor official_scaled")
    if not corr > 0 or (mode == "official_scaled" and math.isinf(corr)):
        raise FlowError(
            f"branch_corr={corr} with branch_noise={mode}: siblings need corr > 0 to differ, a "
            "finite one where it scales them; inf (correlated only) makes them independent"
        )
    if mode == "official_scaled":
        return corr * eta_b
    if math.isinf(corr):
        return eta_b
    return (xi_0 + corr * eta_b) / math.sqrt(1 + corr**2)


def _draw(
    seed: int, iteration: int, time: int, trees: Sequence[TreeKey], shape: Sequence[int]
) -> Tensor:
    """One stream for each tree: float32 [P, *shape]."""
    drawn = np.empty((len(trees), *shape), np.float32)
    for row, (prompt_id, tree) in zip(drawn, trees, strict=True):
        _STREAM.restart(noise_key(seed, prompt_id, tree, iteration, time))
        _STREAM.generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(drawn)


class _Stream(threading.local):
    """One generator a thread, set to the start of one stream after another.

    A new `np.random.Philox(key=key)` for each would be the same, and ten times as slow: it asks the
    system for entropy and then drops it.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self.generator = np.random.Generator(self._philox)

    def restart(self, key: int) -> None:
        state = {"counter": (0, 0, 0, 0), "key": (key & (2**64 - 1), key >> 64)}
        unused = {"buffer": (0, 0, 0, 0), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        self._philox.state = {"bit_generator": "Philox", "state": state, **unused}  # type: ignore


_STREAM = _Stream()
