"""Rewards that look at pixels.

They have the signature of all rewards: `completions` are images, one [C, H, W] tensor of floats in
[0, 1] each, channels first. Each public function is a factory: it takes the parameters and returns
the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlalign.rewards.verdict import RewardError

Reward = Callable[..., list[float | None]]


def symmetry() -> Reward:
    """1 for an image that equals its mirror image, less the mean difference of the two: [0, 1]."""

    def score(completions: list[Any], **_: Any) -> list[float | None]:
        image_NCHW = stack(completions)
        return (1 - (image_NCHW - image_NCHW.flip(3)).abs().flatten(1).mean(1)).tolist()

    return score


def ink(target: float | None = None) -> Reward:
    """The mean brightness of the pixels, in [0, 1]; with a `target`, minus the distance to it."""
    if target is not None and not 0 <= target <= 1:
        raise RewardError(f"reward 'ink': target = {target}; a mean brightness is within [0, 1]")

    def score(completions: list[Any], **_: Any) -> list[float | None]:
        mean_N = stack(completions).flatten(1).mean(1)
        return (mean_N if target is None else -(mean_N - target).abs()).tolist()

    return score


class DigitsClassProbability:
    """The reward made by `digits_class_probability`; `load` trains its classifier, once."""

    def load(self) -> None:
        from rlalign.models.digit_images import load_classifier

        self._classifier = load_classifier()

    def __call__(self, completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
        image_NCHW = stack(completions)
        if image_NCHW.shape[1:] != (1, 8, 8):
            raise RewardError(
                f"images of shape {tuple(image_NCHW.shape[1:])}: the classifier of "
                "digits_class_probability knows those of mini:digits, (1, 8, 8)"
            )
        prob_NC = self._classifier(image_NCHW).softmax(1)
        return [
            None if digit is None else float(row[int(digit)])
            for row, digit in zip(prob_NC, answer, strict=True)
        ]


def digits_class_probability() -> DigitsClassProbability:
    """The probability that a small classifier gives the digit in the `answer` column, 0 to 9.

    A row whose answer is None does not apply. Needs scikit-learn, for the data.
    """
    return DigitsClassProbability()


def digits_judge() -> Reward:
    """1 where an SVM that no training sees reads the digit in the `answer` column, else 0: to
    watch, with weight 0, whether a rise of `digits_class_probability` is real. Needs scikit-learn.
    """

    def score(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
        from rlalign.models.digit_images import judge_labels

        seen = judge_labels(stack(completions)).tolist()
        return [
            None if digit is None else float(int(digit) == label)
            for digit, label in zip(answer, seen, strict=True)
        ]

    return score


def stack(completions: list[Any]) -> Tensor:
    """The images as one float32 tensor [N, C, H, W] on the CPU. RewardError for anything else."""
    for image in completions:
        if not isinstance(image, Tensor) or image.ndim != 3:
            what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise RewardError(
                f"this reward scores images, tensors [C, H, W]; it got {what}. It is for runs of "
                "flow models; those of language models have text rewards"
            )
    return torch.stack(completions).float().cpu()
