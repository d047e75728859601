"""Options of reflective decoding (rlalign/testtime/reflect.py)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option


@dataclass
class ReflectConfig:
    """How a masked-diffusion model's sequence is repaired."""

    steps: int = option(5, "Forward passes in which a canvas, or a block of it, is filled.", ge=1)
    block_size: int = option(
        0, "Positions that are filled before those after them; 0: the whole canvas at once.", ge=0
    )
    max_iters: int = option(10, "Repairs that are tried.", ge=0)
    order: str = option(
        "earliest",
        "Which violated unit comes first: the earliest, right where later units follow from "
        "earlier ones, or the one judged worst.",
        choices=("earliest", "worst"),
    )
    objective: str = option(
        "lexicographic",
        "A candidate is chosen by the safety around its unit, then the score; or by the score "
        "alone (plain), which says nothing while another violation makes it 0.",
        choices=("lexicographic", "plain"),
    )
    local_radius: int = option(
        0, "Units on either side of the repaired one whose safety the choice looks at.", ge=0
    )
    safe_threshold: float = option(
        1.0, "A unit whose safety is below this is violated.", gt=0.0, le=1.0
    )
    regen: str = option(
        "suffix",
        "What the model writes anew after a repair: from the unit before it on, the units within "
        "window_radius of it, or all. Anchors and givens stay.",
        choices=("suffix", "window", "all"),
    )
    window_radius: int = option(1, "Of regen=window, in units.", ge=0)
    max_anchors: int = option(
        0, "Repaired units that stay fixed; beyond it the oldest is let go. 0: no limit.", ge=0
    )
    temperature: float = option(
        0.0, "Of what is written anew; 0 takes the likeliest token.", ge=0.0
    )
    seed: int = option(
        0,
        "Of all that is drawn, and of the problems that a domain makes itself.",
        ge=0,
        le=2**31 - 1,
    )
    max_rows: int = option(256, "Rows of one forward pass at most.", ge=1)
