"""Ours and others' functions of the same purpose agree, as the kernel benchmark uses them.

In float32, where the peers' rounding of logits to the inputs' dtype does nothing.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import _kernel_peers as peers
from tests.kernels.cases import assert_near, draw, gradients, score

TOLERANCE = 1e-4
N, D, V = 700, 32, 521  # two of the peers work in chunks of 256 and 512 rows

PEERS = {
    "F.linear_cross_entropy": ("torch", lambda entropy: peers.torch_linear_cross_entropy(256)),
    "TRL": ("trl", peers.trl),
    "Liger scaled CE": ("liger_kernel", peers.liger_scaled),
}
WITH_ENTROPY = ["TRL", "Liger scaled CE"]
WITH_IGNORED_ROWS = ["F.linear_cross_entropy", "Liger scaled CE"]


def peer(name, entropy=False):
    """Skips where it is not installed; a release that lacks the function is an error."""
    package, build = PEERS[name]
    pytest.importorskip(package)
    return build(entropy)


def assert_agree(name, entropy, ignored=False):
    """Upstreams differ from token to token, have either sign, and are zero for some."""
    hidden, weight, _, target, *upstream = draw(N, D, V, bias=False, dtype=torch.float32)
    if ignored:
        target[5::11] = -100
    theirs = peer(name, entropy)(hidden, weight, target)
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    ours = score(hidden, weight, target, return_entropy=entropy)[: 1 + entropy]
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want.float(), atol=TOLERANCE, rtol=0)
    used, inputs = upstream[: 1 + entropy], (hidden, weight)
    pairs = zip(gradients(ours, used, inputs), gradients(theirs, used, inputs), strict=True)
    for got, want in pairs:
        assert_near(got, want, TOLERANCE)


@pytest.mark.parametrize("name", PEERS)
def test_log_probs_and_their_gradients_agree(name):
    assert_agree(name, entropy=False)


@pytest.mark.parametrize("name", WITH_ENTROPY)
def test_entropies_and_their_gradients_agree(name):
    assert_agree(name, entropy=True)


@pytest.mark.parametrize("name", WITH_IGNORED_ROWS)
def test_ignored_rows_agree(name):
    assert_agree(name, entropy=False, ignored=True)
