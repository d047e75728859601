"""The peer of `offline`: TRL's DPOTrainer on a CPU: python benchmarks/_offline_trl.py SPEC_JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(spec: dict[str, Any]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    data = load_dataset("json", data_files=spec["data"], split="train")
    options = trl.DPOConfig(
        output_dir=spec["out"] + "-work",
        loss_type=[spec["loss"]],
        beta=spec["beta"],
        learning_rate=spec["rate"],
        lr_scheduler_type="linear",
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["batch"],
        max_length=128,
        precompute_ref_log_probs=True,
        disable_dropout=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        max_grad_norm=1.0,
        weight_decay=0.0,
        seed=spec["seed"],
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"]),
        args=options,
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(spec["out"])
    tokenizer.save_pretrained(spec["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
