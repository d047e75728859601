"""One of two processes of test_ranks.py: trains at every ZeRO stage, leaves the results in files.

`python ranks_worker.py FOLDER`. FOLDER/before holds checkpoints that one process wrote and
FOLDER/model and FOLDER/untied random language models.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from rlalign.config.schema import LoraConfig, ModelConfig, TrainerConfig
from rlalign.trainer import checkpoint
from rlalign.trainer.deepspeed_engine import DeepSpeedEngine
from rlalign.trainer.distributed import DistributedError, World, joined_world
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.policy import Policy
from rlalign.types import TrainBatch
from tests.trainer.engine_conformance import OPTIM, Net, learning_rate, share, snapshot

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLACES = {
    "float32-zero0": (0, False),
    "float32-zero1": (1, False),
    "float32-zero2": (2, False),
    "float32-zero2-offload": (2, True),
    "float32-zero3": (3, False),
    "float32-zero3-offload": (3, True),
    "bfloat16-zero1": (1, False),
    "bfloat16-zero2": (2, False),
    "bfloat16-zero3": (3, False),
}
CASES = {
    name: TrainerConfig(
        zero_stage=stage,
        offload_optimizer=offload,
        offload_param=offload and stage == 3,
        optim=OPTIM,
    )
    for name, (stage, offload) in PLACES.items()
}
POLICIES = [*(("full", stage) for stage in range(4)), ("lora", 2), ("lora", 3)]
MINE = {0: (slice(0, 2), slice(2, 5)), 1: (slice(5, 6), slice(6, 8))}  # uneven, two each


def take_step(engine: DeepSpeedEngine, step: int, *, poison: bool = False):
    """The global batch of engine_conformance, shared out; NaN comes from rank 1 only."""
    rank = engine.world.rank
    for i, rows in enumerate(MINE[rank]):
        loss = share(engine.forward, rows, step, use_spare=step == i == 0)
        engine.backward(loss * float("nan") if poison and rank == 1 and i == 0 else loss)
    return engine.step(learning_rate(step))


def save_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def train_case(name: str, config: TrainerConfig, world: World, folder: Path) -> dict:
    """Go on from one process's checkpoint: a poisoned step, a good one, a checkpoint, one more."""
    dtype = DTYPES[name.partition("-")[0]]
    engine = DeepSpeedEngine(Net(seed=4), config, dtype=dtype, world=world)
    first = take_step(engine, 0)
    gradient = {k: v for k, v in snapshot(engine).items() if k.startswith("exp_avg/")}
    checkpoint.load(folder / "before" / name.partition("-")[0] / "step_1", engine=engine)
    poisoned = take_step(engine, 1, poison=True)
    unchanged = snapshot(engine)
    take_step(engine, 1)
    path = checkpoint.save(
        folder / "after" / name, 2, engine=engine, state={}, save_model=save_model, keep=1
    )
    take_step(engine, 2)
    last = snapshot(engine)
    checkpoint.load(path, engine=engine)
    take_step(engine, 2)
    again = snapshot(engine)
    weights = {key: value.clone() for key, value in engine.named_parameters_full()}
    engine.close()
    if world.is_main:
        kept = {"gradient": gradient, "unchanged": unchanged, "last": last, "weights": weights}
        for part, tensors in kept.items():
            save_file(tensors, folder / f"{name}.{part}.safetensors")
    return {
        "grad_norm": first.grad_norm,
        "skipped": poisoned.skipped,
        "num_updates": engine.num_updates,
        "resumed_alike": all(torch.equal(last[key], again[key]) for key in last),
    }


def policy_batch() -> TrainBatch:
    """Eight sequences of random tokens with random weights, so every token matters."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((5, 9), (3, 4), (1, 14), (8, 2), (2, 9), (6, 5), (4, 1), (3, 3))
    length_B = torch.tensor([completion for _, completion in shapes])
    mask_BT = (torch.arange(14) < length_B[:, None]).float()
    tokens = [torch.randint(0, 262, (sum(shape),), generator=rng).tolist() for shape in shapes]
    return TrainBatch(
        sequences=tuple(tuple(row) for row in tokens),
        completion_len_B=length_B,
        group_id_B=torch.zeros(8, dtype=torch.long),
        mask_BT=mask_BT,
        reward_B=torch.zeros(8),
        logp_rollout_BT=torch.zeros_like(mask_BT),
        weight_BT=torch.randn(mask_BT.shape, generator=rng) * mask_BT,
    )


def policy_step(engine: TrainEngine, parts: Sequence[slice]) -> dict[str, torch.Tensor]:
    """One step of the real policy on the rows in `parts`; returns the gradient, times 1 - beta1."""
    batch = policy_batch()
    for part in parts:
        micro = batch.rows(range(part.start, part.stop))
        output = engine.forward(micro, 0.9, entropy=True)
        assert micro.weight_BT is not None
        engine.backward(((output.logp_BT + 0.1 * output.entropy_BT) * micro.weight_BT).sum() / 8)
    engine.step(1e-3)
    return {k: v for k, v in snapshot(engine).items() if k.startswith("exp_avg/")}


def make_policy(kind: str, folder: Path) -> Policy:
    """All of a model with a tied head, or adapters on another one's head and elsewhere. Their rank
    makes A and B so large that ZeRO-3 splits them; B starts at zero, which would hide A."""
    if kind == "full":
        return Policy.from_config(ModelConfig(path=str(folder / "model")))
    lora = LoraConfig(rank=400, target_modules=r".*\.q_proj|lm_head")
    policy = Policy.from_config(ModelConfig(path=str(folder / "untied"), lora=lora))
    rng = torch.Generator().manual_seed(5)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.02
    return policy


def train_policy(kind: str, stage: int, world: World, folder: Path) -> None:
    config = TrainerConfig(zero_stage=stage, optim=OPTIM)
    engine = DeepSpeedEngine(make_policy(kind, folder), config, world=world)
    gradient = policy_step(engine, MINE[world.rank])
    engine.close()
    if world.is_main:
        save_file(gradient, folder / f"policy-{kind}-zero{stage}.safetensors")


def exchange(world: World) -> dict:
    """Every kind of exchange, and at the end one that a peer is late for."""
    payload = bytes(range(world.rank * 5, 256)) * (1 + 3 * world.rank)
    result = {
        "gathered": [part.hex() for part in world.all_gather_bytes(payload, "payloads")],
        "empty": [len(part) for part in world.all_gather_bytes(b"", "nothing")],
        "broadcast": world.broadcast_bytes(payload if world.rank == 1 else None, "b", 1).hex(),
        "sum": world.all_reduce_sum(torch.tensor([1.5, world.rank]), "sum").tolist(),
        "max": world.all_reduce_max(torch.tensor([-world.rank, world.rank]), "max").tolist(),
    }
    world.barrier("end of the exchanges")
    if world.rank == 1:
        time.sleep(2.0)
        return result
    impatient = World(world.rank, world.size, timeout_s=0.2)
    try:
        impatient.barrier("group 17")
    except DistributedError as error:
        result["late"] = str(error)
    return result


def main(folder: Path) -> None:
    with joined_world("cpu", timeout_s=120.0) as world:
        report = {name: train_case(name, case, world, folder) for name, case in CASES.items()}
        for kind, stage in POLICIES:
            train_policy(kind, stage, world, folder)
        report["exchange"] = exchange(world)
        (folder / f"rank{world.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
