"""The flow model of `mini:digits`: pre-trained on real images (digit_images.py) with wrong labels
mixed in, so that it draws the digit asked for about half of the time.

Legend: N images, CHW one channel of 8 by 8 pixels, T1 grid points.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rlalign.models.building import (
    Progress,
    build_once,
    digest_of,
    one_thread,
    reporting,
    write_start,
)
from rlalign.models.digit_images import load_digits
from rlalign.models.mini_flow import MiniFlow
from rlalign.tasks.mini import FlowTraining, MiniFlowTask


def build_digits(
    task: MiniFlowTask, seed: int, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The folder of a flow model for `task`: from the cache, or trained now in about half a minute.

    Raises ModelError without scikit-learn, and as `build_once` does.
    """

    def write(folder: Path) -> None:
        data = load_digits()
        with reporting(f"mini:{task.name}", progress) as report:
            model = pretrain(task.model, data.train_NCHW, data.train_label_N, seed, report)
        model.save_pretrained(folder)
        write_start(folder, f"mini:{task.name}", seed)

    recipe = dataclasses.asdict(task.model)
    return build_once(f"{task.name}-seed{seed}-{digest_of(recipe)}", write, cache_dir)


def pretrain(
    recipe: FlowTraining,
    x0_NCHW: Tensor,
    label_N: Tensor,
    seed: int,
    progress: Progress = lambda stage, done, total: None,
) -> MiniFlow:
    """A new flow model of these latents, trained on one thread: a function of its arguments.

    Flow matching, loss |v(z, sigma, label) - (eps - x0)|^2 with logit-normal sigma (arXiv
    2403.03206); what comes out is the moving average of the weights.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"net": recipe.net, "width": recipe.width, "blocks": recipe.blocks}
        model = MiniFlow(recipe.labels, x0_NCHW.shape[1:], **shape)
        weights = list(model.parameters())
        average = [w.detach().clone() for w in weights]
        optimizer = torch.optim.AdamW(weights, recipe.lr, fused=True)
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * (1 + math.cos(math.pi * step / recipe.steps)) / 2
            _flow_matching_loss(model, recipe, x0_NCHW, label_N).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            kept = min(recipe.ema, (1 + step) / (10 + step))  # short while there is little to keep
            for mean, weight in zip(average, weights, strict=True):
                mean.lerp_(weight.detach(), 1 - kept)
            progress("flow matching", step + 1, recipe.steps)
        for weight, mean in zip(weights, average, strict=True):
            weight.data.copy_(mean)
    return model.eval()


def _flow_matching_loss(
    model: MiniFlow, recipe: FlowTraining, x0_NCHW: Tensor, label_N: Tensor
) -> Tensor:
    """Of one batch, drawn from the global generator."""
    row_N, num_labels = torch.randint(len(label_N), (recipe.batch_size,)), len(recipe.labels)
    x0, label_N = x0_NCHW[row_N], label_N[row_N]
    other_N = torch.randint(num_labels, row_N.shape)
    label_N = torch.where(torch.rand(row_N.shape) < recipe.label_noise, other_N, label_N)
    label_N = torch.where(torch.rand(row_N.shape) < recipe.null_share, num_labels, label_N)
    sigma_N, eps = torch.randn(row_N.shape).sigmoid(), torch.randn_like(x0)
    z = torch.lerp(x0, eps, sigma_N[:, None, None, None])
    return F.mse_loss(model(z, sigma_N, {"label": label_N}), eps - x0)
