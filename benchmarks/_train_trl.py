"""The peer of `train`: TRL's GRPOTrainer on a CPU, in a process of its own, as fast as its options
allow: HF generate with a dynamic cache (its vLLM modes need CUDA or fail; a static cache was 1.3
times slower here, transformers' continuous batching 4.5 times), the whole batch in one forward
pass, no reference model, no logging, no checkpoints, fused AdamW.

    python benchmarks/_train_trl.py SPEC.json MODEL_FOLDER RESULT.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from _train_reward import reward
from _train_spec import TrainSpec, matmul_flops_per_s, peak_rss_bytes


def run_trl(spec: TrainSpec, model_folder: str) -> dict[str, Any]:
    """Train `warmup_steps + steps` steps and return the figures of the timed ones, a list entry per
    step: seconds in all and by part, completion tokens; also every completion's length."""
    import torch
    import trl

    torch.set_num_threads(spec.num_threads)
    rate_before = matmul_flops_per_s(spec.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = _build(spec, model_folder, folder)
        trainer.train()
    timed = clock.steps[spec.warmup_steps :]
    parts = sorted(set().union(*timed) - {"total", "cpu", "lengths"})
    return {
        "side": f"trl {trl.__version__}",
        "step_s": [step["total"] for step in timed],
        "cpu_s": [step["cpu"] for step in timed],
        "tokens": [sum(step["lengths"]) for step in timed],
        "split_s": {part: [step[part] for step in timed] for part in parts},
        "lengths": [length for step in timed for length in step["lengths"]],
        "peak_rss_bytes": peak_rss_bytes(),
        "matmul_flops_per_s": [rate_before, matmul_flops_per_s(spec.num_threads)],
    }


class Clock:
    """Seconds by part for every step, by wrapping methods; a step ends when the next begins."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._parts: dict[str, Any] = defaultdict(float)
        self._start = self._cpu_start = 0.0

    def time(self, owner: Any, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self._parts[part] += time.perf_counter() - start
            return result

        setattr(owner, method, timed)

    def generated(self, completions: list[list[int]]) -> None:
        self._parts["lengths"] = [len(completion) for completion in completions]

    def begin(self) -> None:
        self._parts = defaultdict(float)
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self._parts["total"] = time.perf_counter() - self._start
        self._parts["cpu"] = time.process_time() - self._cpu_start
        self.steps.append(dict(self._parts))


def _build(spec: TrainSpec, model_folder: str, folder: str) -> tuple[Any, Clock]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        seed=spec.seed,
        max_steps=spec.steps + spec.warmup_steps,
        per_device_train_batch_size=spec.num_prompts * spec.group_size,
        gradient_accumulation_steps=1,
        num_generations=spec.group_size,
        max_completion_length=spec.max_completion_length,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=model_folder,
        reward_funcs=reward,  # type: ignore[arg-type]
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in spec.prompts()]),
        processing_class=AutoTokenizer.from_pretrained(model_folder, padding_side="left"),
    )
    clock = Clock()
    generate = trainer._generate_single_turn

    def counted(*a: Any, **k: Any) -> Any:
        result = generate(*a, **k)
        clock.generated(result[0])
        return result

    trainer._generate_single_turn = counted
    clock.time(trainer, "_generate_single_turn", "rollout")
    clock.time(trainer, "_calculate_rewards", "reward")
    clock.time(trainer, "_compute_loss", "forward")
    clock.time(trainer.accelerator, "backward", "backward")

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    trainer.add_callback(Steps())
    return trainer, clock


if __name__ == "__main__":
    spec_file, model, result_file = map(Path, sys.argv[1:])
    figures = run_trl(TrainSpec.from_json(spec_file.read_text()), str(model))
    result_file.write_text(json.dumps(figures))
