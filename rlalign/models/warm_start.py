"""Supervised training of a mini model: phases of demonstrations, Muon and AdamW, one thread.

Legend: B sequences of a batch, T their padded length, N completion tokens, D hidden size, V tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlalign.models.building import Progress, one_thread
from rlalign.models.muon import Muon
from rlalign.models.random import init_model, small_config
from rlalign.tasks.mini import MiniModel, MiniTask, WarmStart

WARMUP_STEPS = 10
COOLDOWN = 0.4  # share of a phase in which the rates fall
MICRO_BATCHES = 2  # a batch runs as this many, sorted by length: less padding, the same gradient

Example = tuple[list[int], list[int]]  # token ids of a prompt and of its completion


def warm_start(
    task: MiniTask,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = lambda stage, done, total: None,
) -> PreTrainedModel:
    """A new model, trained through the phases of the task's recipe on one thread."""
    recipe = task.model
    config = small_config(
        "qwen2",
        vocab=len(tokenizer),
        hidden=recipe.hidden,
        layers=recipe.layers,
        heads=recipe.heads,
        kv_heads=recipe.kv_heads,
        mlp=recipe.mlp,
        max_positions=recipe.max_positions,
        tied=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with one_thread():
        model = init_model(config, seed)
        for phase in recipe.phases:
            _run_phase(model, tokenizer, recipe, phase, seed, progress)
    return model.eval()


@torch.no_grad()
def greedy_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: MiniTask
) -> float:
    """Share of held-out questions, 0 to 1, whose greedy completion is right."""
    prompts = [row["prompt"] for row in task.make_rows("eval", size=task.model.eval_size)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    limit = task.model.max_new_tokens
    with one_thread():
        ids = model.generate(**batch, do_sample=False, max_new_tokens=limit)  # type: ignore[operator]
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [task.is_correct(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return sum(right) / len(right)


def _run_phase(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: MiniModel,
    phase: WarmStart,
    seed: int,
    progress: Progress,
) -> None:
    examples = _encode(tokenizer, phase, seed, phase.steps * recipe.batch_size)
    optimizers = _optimizers(model, phase, recipe.weight_decay)
    model.train()
    for step in range(phase.steps):
        scale = rate_scale(step, phase.steps)
        batch = examples[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        _backward(model, batch)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["peak_lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress(phase.name, step + 1, phase.steps)


def _backward(model: PreTrainedModel, batch: Sequence[Example]) -> None:
    """Gradients of the mean cross-entropy over the batch's completion tokens."""
    backbone, head = model.base_model, model.get_output_embeddings()
    assert head is not None
    by_length = sorted(batch, key=lambda example: len(example[0]) + len(example[1]))
    num_targets = sum(len(completion) for _, completion in batch)
    size = math.ceil(len(batch) / MICRO_BATCHES)
    for start in range(0, len(batch), size):
        ids_BT, target_BT = _pad(by_length[start : start + size])
        hidden_BTD = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        counted = target_BT >= 0
        logits_NV = head(hidden_BTD[counted])
        loss = F.cross_entropy(logits_NV, target_BT[counted], reduction="sum") / num_targets
        loss.backward()


def _pad(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and at each position the token to predict there or -1, both [B, T].

    Padding is on the right, where a causal model cannot see it.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in batch)
    ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
    target_BT = torch.full((len(batch), width), -1)
    for i, (prompt, completion) in enumerate(batch):
        end = len(prompt) + len(completion)
        ids_BT[i, :end] = torch.tensor(prompt + completion)
        target_BT[i, len(prompt) - 1 : end - 1] = torch.tensor(completion)
    return ids_BT, target_BT


def _encode(
    tokenizer: PreTrainedTokenizerBase, phase: WarmStart, seed: int, count: int
) -> list[Example]:
    pairs = list(itertools.islice(phase.demonstrations(seed), count))
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    completions = tokenizer([completion for _, completion in pairs])["input_ids"]
    end = [tokenizer.eos_token_id]
    return [(prompt, ids + end) for prompt, ids in zip(prompts, completions, strict=True)]


def _optimizers(
    model: PreTrainedModel, phase: WarmStart, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices within the blocks, AdamW for embeddings, biases and norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, phase.lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, phase.adamw_lr, weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def rate_scale(step: int, steps: int) -> float:
    """Factor of the rates at step 0, 1, ..., steps - 1: up over the first few, flat, and linearly
    down over the last 40 %."""
    rise = (step + 1) / WARMUP_STEPS
    fall = (steps - step) / (COOLDOWN * steps)
    return min(1.0, rise, fall)
