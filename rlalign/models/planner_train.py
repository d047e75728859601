"""Training of the planner: the expert's plans of thousands of scenes, masked at random.

    loss = E_scene E_{l ~ U{1..T}} E_{l masked}  (1 / l) sum_masked  - sum_v q(v | y_i) log p(v)

which is the bound on the likelihood of a whole plan, divided by T (arXiv 2509.20109 eq. 1 sums
without 1 / l). q is the token itself or, as tokens are places, a bell of `sigma` tokens around it;
only sigma = 0 gives likelihoods.

Legend: B rows, T = 16 tokens, D width, M masked places, V values of the codebook.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlalign.models.building import (
    Progress,
    build_once,
    digest_of,
    one_thread,
    reporting,
    write_start,
)
from rlalign.models.errors import ModelError
from rlalign.models.masked_diffusion import Canvas
from rlalign.models.planner import NUM_TOKENS, Planner
from rlalign.tasks.driving.codebook import Codebook
from rlalign.tasks.driving.expert import make_scene
from rlalign.tasks.driving.features import scene_features
from rlalign.tasks.driving.scenes import Scene

NAME = "toydrive"
FIRST_TEST_SEED = 1_000_000  # training scenes have seeds below, those that measure from here on
NUM_FINGERPRINT = 32  # scenes that enter the digest of a recipe
SCENES_FILE = "scenes.safetensors"
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class PlannerRecipe:
    """All that decides a planner, but for its seed. The rate falls to 0 as a cosine does."""

    num_scenes: int = 8000
    steps: int = 2400
    batch_size: int = 128
    lr: float = 1e-3  # AdamW
    weight_decay: float = 0.01
    sigma: float = 1.5  # tokens
    extent_m: float = 50.0
    step_m: float = 0.25
    width: int = 96
    layers: int = 3
    heads: int = 4


RECIPES = {
    "full": PlannerRecipe(),
    "smoke": PlannerRecipe(num_scenes=500, steps=300, batch_size=64),
}


def build_planner(
    seed: int,
    size: str = "full",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder of a planner: from the cache, or trained now, in about eight minutes on one core
    ("full") or half a minute ("smoke"). `load_planner` reads it.

    Raises ModelError for another size, and as `build_once` does; TaskError without shapely.
    """
    if size not in RECIPES:
        raise ModelError(f"size={size!r} of a planner is none of {', '.join(RECIPES)}")
    return train_recipe(RECIPES[size], seed, cache_dir, progress)


def train_recipe(
    recipe: PlannerRecipe,
    seed: int,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """As `build_planner`, for any recipe."""

    def write(folder: Path) -> None:
        with reporting(NAME, progress) as report:
            data = training_data(recipe.num_scenes, cache_dir, report)
            planner = train(recipe, seed, data, report)
        planner.save_pretrained(folder)
        write_start(folder, NAME, seed, recipe=dataclasses.asdict(recipe))

    key = digest_of([dataclasses.asdict(recipe), _fingerprint()])
    return build_once(f"{NAME}-planner-seed{seed}-{key}", write, cache_dir)


def training_data(
    num_scenes: int,
    cache_dir: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Tensor]:
    """Features of scenes 0 to `num_scenes` - 1 and the expert's `waypoints` float64 [B, 8, 2]:
    from the cache, or made now, about 200 scenes a second."""

    def write(folder: Path) -> None:
        scenes: list[Scene] = []
        for seed in range(num_scenes):
            scenes.append(make_scene(seed))
            progress("scenes", seed + 1, num_scenes)
        save_file(_examples(scenes), folder / SCENES_FILE)

    key = digest_of([num_scenes, _fingerprint()])
    folder = build_once(f"{NAME}-scenes-{key}", write, cache_dir)
    return load_file(folder / SCENES_FILE)


def train(
    recipe: PlannerRecipe,
    seed: int,
    data: dict[str, Tensor],
    progress: Progress = lambda stage, done, total: None,
) -> Planner:
    """A new planner of these examples, trained on one thread: a function of its arguments."""
    features = dict(data)
    codebook = Codebook(recipe.extent_m, recipe.step_m)
    ids_BT = codebook.encode(features.pop("waypoints").numpy())
    target_VV = ordinal_targets(codebook.size, recipe.sigma)
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        planner = Planner(codebook, recipe.width, recipe.layers, recipe.heads)
        optimizer = torch.optim.AdamW(
            planner.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * (1 + math.cos(math.pi * step / recipe.steps)) / 2
            row_B = torch.randint(len(ids_BT), (recipe.batch_size,))
            batch = Canvas(ids_BT, cond=features).rows(row_B)
            masked_loss(planner, batch, target_VV).backward()
            torch.nn.utils.clip_grad_norm_(planner.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress("planner", step + 1, recipe.steps)
    return planner.eval().requires_grad_(False)


def masked_loss(planner: Planner, batch: Canvas, target_VV: Tensor) -> Tensor:
    """Of complete plans, with masks drawn from the global generator: a scalar, in nats a token."""
    ids_BT = batch.ids_BT
    num_masked_B = torch.randint(1, NUM_TOKENS + 1, (len(batch),))
    rank_BT = torch.rand(ids_BT.shape).argsort(1).argsort(1)
    masked_BT = rank_BT < num_masked_B[:, None]
    canvas = batch.with_ids(ids_BT.masked_fill(masked_BT, planner.mask_id))
    logp_MV = F.log_softmax(planner.head(planner.hidden(canvas)[masked_BT]), -1)
    loss_M = -(target_VV[ids_BT[masked_BT]] * logp_MV).sum(-1)
    weight_BT = (1 / num_masked_B)[:, None].expand(ids_BT.shape)
    return (weight_BT[masked_BT] * loss_M).sum() / len(batch)


def ordinal_targets(size: int, sigma: float) -> Tensor:
    """Row k: the distribution over tokens that training takes for the truth k, float32 [V, V].

    exp(-(v - k)^2 / (2 sigma^2)), normalised over the codebook; sigma = 0 is the token alone.
    """
    if sigma == 0:
        return torch.eye(size)
    value_V = torch.arange(size, dtype=torch.float64)
    bell_VV = torch.exp(-((value_V - value_V[:, None]) ** 2) / (2 * sigma**2))
    return (bell_VV / bell_VV.sum(1, keepdim=True)).float()


def _examples(scenes: list[Scene]) -> dict[str, Tensor]:
    experts = [torch.from_numpy(s.expert_N2) for s in scenes if s.expert_N2 is not None]
    return {**scene_features(scenes), "waypoints": torch.stack(experts)}


def _fingerprint() -> list[Any]:
    """Changes whenever scenes, experts or features do; the last digits may differ by machine."""
    examples = _examples([make_scene(seed) for seed in range(NUM_FINGERPRINT)])
    return [[round(x, 4) for x in value.flatten().tolist()] for value in examples.values()]
