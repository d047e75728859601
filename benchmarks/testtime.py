"""Test-time methods on a frozen model: LatentSeek, RAIN and logit fusion, each beside its peers.

The peers of speed follow the published semantics literally (no cache, one prompt at a time), in
code of our own (_latent_literal.py, _rain_literal.py). The peers of quality are greedy decoding,
best-of-N and majority voting at equal tokens, and for fusion the models alone and a fixed strength.
"""

from __future__ import annotations

import platform
from typing import Any

import _testtime_fusion
import _testtime_latent
import _testtime_rain
import torch

PARTS = {
    "latent_seek": _testtime_latent,
    "rain": _testtime_rain,
    "logit_fusion": _testtime_fusion,
}


def run(quick: bool) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    for method, part in PARTS.items():
        found = part.run(quick)
        rows += [{"method": method, **row} for row in found["rows"]]
        bars += [{**bar, "what": f"{method}: {bar['what']}"} for bar in found["bars"]]
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return {"name": "testtime", "machine": machine, "rows": rows, "bars": bars}
