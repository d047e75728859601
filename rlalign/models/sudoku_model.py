"""A small masked-diffusion model of 4x4 Sudoku grids (tasks/sudoku.py), trained here once.

A bidirectional transformer of Hugging Face, trained on 200 grids and all their digit permutations
to fill in what is masked:

    loss = E_{l ~ U{1..16}} 16 / l sum_{masked i} -log p(x_i | the rest)      the ELBO's weights

It never sees a rule, and with few steps it commits digits that contradict each other: that is what
a search at test time repairs.

Legend: B grids, T = 16 cells.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlalign.models.building import (
    Progress,
    build_once,
    digest_of,
    one_thread,
    reporting,
    write_start,
)
from rlalign.models.flow import WEIGHTS_FILE
from rlalign.models.masked_diffusion import Canvas, MaskedDiffusionLM
from rlalign.tasks.sudoku import BLANK, NUM_CELLS, NUM_DIGITS, split_grids


@dataclass(frozen=True, slots=True)
class SudokuRecipe:
    """Shape and training of the model."""

    hidden: int = 48
    layers: int = 2
    heads: int = 4
    steps: int = 600
    batch_size: int = 128
    lr: float = 4e-3  # AdamW; falls to 0 as a cosine does


def load_sudoku_model(
    seed: int = 0,
    recipe: SudokuRecipe = SudokuRecipe(),
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> MaskedDiffusionLM:
    """From the cache, or trained now in under a minute. Raises ModelError as `build_once` does."""

    def write(folder: Path) -> None:
        with reporting("sudoku", progress) as report:
            model = train_sudoku(recipe, seed, report)
        save_file(model.model.state_dict(), folder / WEIGHTS_FILE)
        write_start(folder, "sudoku", seed)

    name = f"sudoku-seed{seed}-{digest_of(dataclasses.asdict(recipe))}"
    folder = build_once(name, write, cache_dir)
    model = _new_model(recipe)
    model.model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()


def train_sudoku(
    recipe: SudokuRecipe, seed: int, progress: Progress = lambda stage, done, total: None
) -> MaskedDiffusionLM:
    """A new model, trained on one thread: a function of its arguments."""
    grids_NT, _ = split_grids()
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(recipe)
        optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, fused=True)
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * (1 + math.cos(math.pi * step / recipe.steps)) / 2
            _loss(model, _batch(grids_NT, recipe.batch_size)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress("masked diffusion", step + 1, recipe.steps)
    return model.eval()


def _new_model(recipe: SudokuRecipe) -> MaskedDiffusionLM:
    # GPT-2 has learned absolute positions; with rotary ones, which are relative, a cell finds out
    # only slowly where in the grid it lies
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=NUM_DIGITS + 1,
        n_embd=recipe.hidden,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        n_positions=NUM_CELLS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        is_causal=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MaskedDiffusionLM(AutoModelForCausalLM.from_config(config), BLANK)


def _batch(grids_NT: Tensor, size: int) -> Tensor:
    """Grids drawn with replacement, their digits permuted."""
    row_BT = grids_NT[torch.randint(len(grids_NT), (size,))]
    permutation_BD = torch.rand(size, NUM_DIGITS).argsort(1)
    return permutation_BD.gather(1, row_BT)


def _loss(model: MaskedDiffusionLM, target_BT: Tensor) -> Tensor:
    num_B1 = torch.randint(1, NUM_CELLS + 1, (len(target_BT), 1))
    masked_BT = torch.rand(target_BT.shape).argsort(1) < num_B1
    logits_BTV = model.logits(Canvas(target_BT.masked_fill(masked_BT, BLANK)))
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
    return (nll_BT * masked_BT / num_B1).sum(1).mean()
