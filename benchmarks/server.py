"""The rollout server: how soon a second job samples, how long new weights take, and what two LoRA
jobs at once are worth against one after the other. Real `rlalign serve`, over HTTP, on the mini
model; the jobs are threads of this process, the engine has one thread of its own."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from typing import Any

import torch
from _serving import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.config.schema import LoraConfig, ServerConfig
from rlalign.models.load import resolve_model_path
from rlalign.models.lora import adapter_config, adapter_weights, attach_lora
from rlalign.rollout.client import RolloutClient
from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.trainer.publish import publish

MODEL = "mini:chain"
SAMPLES = 8  # of a prompt
PROMPTS = (2, 8, 32)  # of a batch; 32 fill the engine's batch of 256
LENGTH = 48
CHANNELS = ("upload", "gloo", "ipc")  # besides memory, which has the bar


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    turns = 3 if quick else 9
    path = resolve_model_path(MODEL, 0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with serving(path) as name:
        first_s = [first_sample_s(tokenizer, name) for _ in range(turns)]
        update_s = update_times_s(path, tokenizer, name, 2 * turns)
        others = {c: update_times_s(path, tokenizer, name, 2 * turns, c) for c in CHANNELS}
    rows = [_row("a second job's first sample", first_s), _row("weight update, memory", update_s)]
    rows += [_row(f"weight update, {channel}", seconds) for channel, seconds in others.items()]
    first, update = (statistics.median(values) for values in (first_s, update_s))
    bars = [
        _bar("a second job's first sample, s", first, "<= 2", first <= 2),
        _bar("weight update, mini model, ms", 1e3 * update, "<= 50", update <= 0.05),
    ]
    with serving(path, "vllm.max_loras=2") as name:
        jobs = [lora_job(path, seed) for seed in (1, 2)]
        for prompts in PROMPTS:
            alone_s, both_s = [], []
            for _ in range(turns):
                alone_s.append(sum(work_s(tokenizer, name, [job], prompts) for job in jobs))
                both_s.append(work_s(tokenizer, name, jobs, prompts))
            size = f"{prompts * SAMPLES} sequences each"
            rows.append(_row(f"two LoRA jobs, {size}, one after the other", alone_s))
            rows.append(_row(f"two LoRA jobs, {size}, at once", both_s))
            full_s = [work_s(tokenizer, name, [None], prompts) for _ in range(turns)]
            rows.append(_row(f"one full job, {size}", full_s))
            gain = statistics.median(a / b for a, b in zip(alone_s, both_s, strict=True))
            what = f"two LoRA jobs, {size}: at once against one after the other"
            bars.append(_bar(what, gain, ">= 1.5", gain >= 1.5))
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return {"name": "server", "machine": machine, "rows": rows, "bars": bars}


def requests(seed: int, prompts: int) -> list[GenerateRequest]:
    rng = torch.Generator().manual_seed(seed)
    return [
        GenerateRequest(
            f"p{i}",
            tuple(torch.randint(5, 50, (12,), generator=rng).tolist()),
            seeds=tuple(range(SAMPLES * i, SAMPLES * (i + 1))),
        )
        for i in range(prompts)
    ]


def first_sample_s(tokenizer: Any, name: str) -> float:
    began = time.perf_counter()
    with RolloutClient("bench", tokenizer, ServerConfig(name=name)) as engine:
        engine.generate([GenerateRequest("p", (5, 6, 7), seeds=(1,))], SamplingParams(LENGTH))
        return time.perf_counter() - began


def update_times_s(
    path: str, tokenizer: Any, name: str, count: int, channel: str = "memory"
) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(path)
    seconds = []
    with RolloutClient("bench", tokenizer, ServerConfig(name=name, channel=channel)) as engine:
        for version in range(count):
            began = time.perf_counter()
            publish(engine, model.named_parameters(), version)
            seconds.append(time.perf_counter() - began)
    return seconds


def lora_job(path: str, seed: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path)
    attach_lora(model, LoraConfig(rank=8, alpha=16), seed)
    return model


def work_s(tokenizer: Any, name: str, jobs: list[Any], prompts: int) -> float:
    """Seconds for every job's rollout batch, all at once, leases and updates excluded."""
    params = SamplingParams(LENGTH, ignore_eos=True)
    ready, seconds = threading.Barrier(len(jobs) + 1), []

    def work(i: int, model: Any) -> None:
        config = None if model is None else adapter_config(model)
        with RolloutClient(f"bench {i}", tokenizer, ServerConfig(name=name), config) as engine:
            if model is not None:
                publish(engine, adapter_weights(model), 1)
            engine.generate(requests(i, 1), params)
            ready.wait()
            engine.generate(requests(i, prompts), params)
            seconds.append(time.perf_counter())

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return max(seconds) - began


def _row(side: str, seconds: list[float]) -> dict[str, Any]:
    low, high = min(seconds), max(seconds)
    return {
        "side": side,
        "median s": statistics.median(seconds),
        "spread s": f"{low:.3g} to {high:.3g}",
    }


def _bar(what: str, value: float, bar: str, holds: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": bar, "holds": holds}
