"""Every identity the algorithms claim, checked against float64 references in this process.

`run` measures the properties of the shared pieces and of each algorithm; `render` makes the table
that `rlalign verify` prints. A module of this package registers its properties when imported.
"""

from rlalign.verify import (
    aggregation,
    contrastive,
    credit,
    divergence,
    elbo,
    estimates,
    gradients,
    logprob,
    mismatch,
    presets,
    sampling,
    shaping,
    trees,
)
from rlalign.verify.table import PROPERTIES, Check, Property, per_algorithm, render, run, shared

__all__ = [
    "PROPERTIES",
    "Check",
    "Property",
    "aggregation",
    "contrastive",
    "credit",
    "divergence",
    "elbo",
    "estimates",
    "gradients",
    "logprob",
    "mismatch",
    "per_algorithm",
    "presets",
    "render",
    "run",
    "sampling",
    "shaping",
    "shared",
    "trees",
]
