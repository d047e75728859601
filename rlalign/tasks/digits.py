"""`mini:digits`: draw the digit that the prompt names, 8 by 8 pixels (models/digits.py).

The ten prompts are all there are, in training and in evaluation: what differs is the noise that an
image starts from.
"""

from __future__ import annotations

from typing import Any

from rlalign.tasks.mini import FlowTraining, MiniFlowTask

NUM_CLASSES = 10
LABELS = tuple(f"digit {digit}" for digit in range(NUM_CLASSES))


def make_rows(split: str) -> list[dict[str, Any]]:
    """The ten prompts, whatever the split.

    >>> make_rows("train")[3]
    {'prompt': 'digit 3', 'answer': 3}
    """
    return [{"prompt": label, "answer": digit} for digit, label in enumerate(LABELS)]


TASK = MiniFlowTask("digits", make_rows, FlowTraining(LABELS))
