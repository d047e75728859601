"""The built-in mini diffusion language models: a small bidirectional Llama, trained here.

One supervised phase on demonstrations of which many are wrong makes a start worth aligning: a
policy that is often right and often not. The loss is the bound itself, with as many masked places
as chance has it (l uniform, weight L/l); there is nothing between prompt and completion, and the
completion always has the same length. Kept in the cache of models/building.py.

Legend: B demonstrations, T tokens, L tokens of a completion.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlalign.config.schema import KernelsConfig
from rlalign.models.building import (
    Progress,
    build_once,
    digest_of,
    one_thread,
    reporting,
    write_start,
)
from rlalign.models.masked_diffusion import MaskedDiffusionLM
from rlalign.models.random import init_model, small_config
from rlalign.models.tokenizer import build_letter_tokenizer
from rlalign.models.warm_start import rate_scale
from rlalign.tasks.mini import MaskedMiniTask, MaskedTraining

NUM_FINGERPRINT = 64  # demonstrations that enter the digest of a recipe


def build_masked(
    task: MaskedMiniTask,
    seed: int,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder of the model of `mini:<task>`: from the cache, or built now. As models/mini.py."""

    def write(folder: Path) -> None:
        tokenizer = build_letter_tokenizer(task.model.alphabet, task.model.max_positions)
        with reporting(f"mini:{task.name}", progress) as report, one_thread():
            lm = train_masked(task.model, seed, tokenizer, report)
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_start(folder, f"mini:{task.name}", seed)

    return build_once(f"{task.name}-seed{seed}-{_digest(task.model, seed)}", write, cache_dir)


def train_masked(
    recipe: MaskedTraining, seed: int, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> MaskedDiffusionLM:
    """A new model, trained on the recipe's demonstrations."""
    mask_id = int(tokenizer.mask_token_id)  # type: ignore[arg-type]
    model = _new_model(recipe, seed, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    examples = recipe.demonstrations(seed)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate_scale(step, recipe.steps)
        batch = list(itertools.islice(examples, recipe.batch_size))
        loss = masked_loss(model, tokenizer, batch, mask_id, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress("training", step + 1, recipe.steps)
    return MaskedDiffusionLM(model.eval(), mask_id, kernels=KernelsConfig())


def masked_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[tuple[str, str]],
    mask_id: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Minus the bound per token, one mask a demonstration. Prompts are all of one length, and so
    are completions."""
    prompt_BT = torch.tensor(tokenizer([prompt for prompt, _ in batch])["input_ids"])
    target_BL = torch.tensor(tokenizer([completion for _, completion in batch])["input_ids"])
    size, length = target_BL.shape
    count_B1 = torch.randint(1, length + 1, (size, 1), generator=generator)
    rank_BL = torch.rand(size, length, generator=generator).argsort(1).argsort(1)
    masked_BL = rank_BL < count_B1
    ids_BT = torch.cat([prompt_BT, target_BL.masked_fill(masked_BL, mask_id)], 1)
    logits_BLV = model(input_ids=ids_BT, use_cache=False).logits[:, -length:]
    logits_BLV[..., mask_id] = -torch.inf
    loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, reduction="none")
    return (loss_BL * masked_BL / count_B1).sum(1).mean()


def _new_model(
    recipe: MaskedTraining, seed: int, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    config = small_config(
        "llama",
        vocab=len(tokenizer),
        hidden=recipe.hidden,
        layers=recipe.layers,
        heads=recipe.heads,
        kv_heads=recipe.heads,
        mlp=recipe.mlp,
        max_positions=recipe.max_positions,
        tied=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        is_causal=False,
    )
    return init_model(config, seed)


def _digest(recipe: MaskedTraining, seed: int) -> str:
    shown = list(itertools.islice(recipe.demonstrations(seed), NUM_FINGERPRINT))
    shape = {k: v for k, v in vars(recipe).items() if not callable(v)}
    assert dataclasses.is_dataclass(recipe)
    return digest_of([shape, shown])
