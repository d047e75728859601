"""The images of `mini:digits`, and two judges of what a model draws of them.

Data: 1797 digits of 8 by 8 pixels (sklearn.datasets.load_digits), as latents x / 8 - 1 in [-1, 1],
split into 1400 for training and 397 that only measure. The reward is the probability that a small
classifier gives the digit asked for; the judge, an SVM that training never sees, shows whether a
rise of the reward is real.

Legend: N images, C classes, CHW one channel of 8 by 8 pixels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlalign.models.building import build_once, digest_of, one_thread
from rlalign.models.errors import ModelError
from rlalign.models.flow import WEIGHTS_FILE
from rlalign.tasks.digits import NUM_CLASSES

NUM_TRAIN = 1400
CLASSIFIER = {"hidden": 128, "steps": 1500, "batch_size": 256, "lr": 5e-3, "input_noise": 0.3}


@dataclass(frozen=True, slots=True)
class Digits:
    """Latents float32 [N, 1, 8, 8] in [-1, 1] and labels int64 [N], 0 to 9."""

    train_NCHW: Tensor
    train_label_N: Tensor
    test_NCHW: Tensor
    test_label_N: Tensor


@functools.cache
def load_digits() -> Digits:
    """The data and its split, which never changes. Raises ModelError without scikit-learn."""
    _, datasets = _sklearn()
    data = datasets.load_digits()
    image_NCHW = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    label_N = torch.from_numpy(data.target).long()
    order_N = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(0))
    train_N, test_N = order_N[:NUM_TRAIN], order_N[NUM_TRAIN:]
    return Digits(image_NCHW[train_N], label_N[train_N], image_NCHW[test_N], label_N[test_N])


class DigitClassifier(nn.Module):
    """The reward: log-odds of the ten digits, [N, 10], of images in [0, 1], [N, 1, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        hidden = CLASSIFIER["hidden"]
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, NUM_CLASSES))

    def forward(self, image_NCHW: Tensor) -> Tensor:
        return self.net((2 * image_NCHW - 1).flatten(1))


@functools.cache
def load_classifier(cache_dir: Path | None = None) -> DigitClassifier:
    """The reward classifier, the same in every run: from the cache, or trained now in seconds.

    It is right on about 98 % of the test images. Raises ModelError as `build_digits` does.
    """
    folder = build_once(f"digits-reward-{digest_of(CLASSIFIER)}", _write_classifier, cache_dir)
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return classifier.eval().requires_grad_(False)


def _write_classifier(folder: Path) -> None:
    data, steps = load_digits(), int(CLASSIFIER["steps"])
    image_NCHW = (data.train_NCHW + 1) / 2
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), CLASSIFIER["lr"], fused=True)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = CLASSIFIER["lr"] * (1 - step / steps)
            row_N = torch.randint(NUM_TRAIN, (int(CLASSIFIER["batch_size"]),))
            noise = CLASSIFIER["input_noise"] / 2 * torch.randn(len(row_N), 1, 8, 8)
            logits_NC = classifier(image_NCHW[row_N] + noise)  # the noise level is that of latents
            F.cross_entropy(logits_NC, data.train_label_N[row_N]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    save_file(classifier.state_dict(), folder / WEIGHTS_FILE)


@functools.cache
def fit_judge() -> Any:
    """The held-out judge: an RBF SVM of scikit-learn on the training images, right on 99 % of the
    others. Fitted anew in each process, in under 0.1 s, because its file would be a pickle."""
    svm, _ = _sklearn()
    data = load_digits()
    judge = svm.SVC(kernel="rbf", C=10.0, gamma="scale")
    return judge.fit(data.train_NCHW.flatten(1).numpy(), data.train_label_N.numpy())


def judge_labels(image_NCHW: Tensor) -> Tensor:
    """The digit that the judge sees in each image in [0, 1]: int64 [N]."""
    return torch.from_numpy(fit_judge().predict((2 * image_NCHW - 1).flatten(1).cpu().numpy()))


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn import datasets, svm
    except ImportError as error:
        raise ModelError(
            f"mini:digits needs scikit-learn ({error}): pip install 'rlalign[flow]'"
        ) from error
    return svm, datasets
