"""Training with DeepSpeed: ZeRO 0 to 3, CPU offload, any number of processes; the numbers of torch.

DeepSpeed averages gradients over processes and steps after a fixed number of micro-batches; the
protocol of `trainer/engine.py` sums shares of one global loss over any number of micro-batches. So
the loss is multiplied by the number of processes, and `managed_gradient_accumulation` is off, which
makes `step()` the boundary.

Where DeepSpeed keeps a parameter's master copy depends on the stage; a `Fragment` hides that. It
says which slice of which flat optimizer tensor holds which slice of the parameter on this process:

    stage 0      the parameter itself
    stage 1, 2   `_hp_mapping`, which DeepSpeed sets on the parameter
    stage 3      `grad_position` of its optimizer

bfloat16 at stage 0 runs as stage 1: DeepSpeed would accumulate gradients in bfloat16 otherwise.
Written against DeepSpeed 0.19; what it relies on inside is listed in `_Zero`.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlalign.trainer.distributed import World, ensure_process_group
from rlalign.trainer.engine import (
    STATE_KINDS,
    GuardedAdamW,
    StepResult,
    TrainEngineError,
    adamw_options,
    cast_parameters,
    check_state,
    init_adamw_state,
    set_lr,
    set_num_updates,
    trainable_parameters,
)

if TYPE_CHECKING:
    from rlalign.config.schema import TrainerConfig

BUCKET_NUMEL = 2**26  # elements reduced or gathered at once: 256 MiB in float32
_WHOLE = -1  # an id no sub-module has: while a parameter carries it, ZeRO-3 does not release it


@dataclass(frozen=True, slots=True)
class Fragment:
    """`flat[offset : offset + numel]` is `parameter.flatten()[start : start + numel]`."""

    flat: torch.Tensor
    offset: int
    start: int
    numel: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment of `flat` or of one of its optimizer moments."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


class DeepSpeedEngine:
    """`TrainEngine` on DeepSpeed. The module returns a tensor, or tuples, lists, dicts of tensors.

    `dtype` is that of the forward pass (parameters are cast in place); masters are float32. Raises
    TrainEngineError on options that DeepSpeed cannot combine.
    """

    def __init__(
        self,
        module: nn.Module,
        trainer: TrainerConfig,
        *,
        dtype: torch.dtype = torch.float32,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.num_updates = 0
        config = deepspeed_config(trainer, dtype)
        stage = config["zero_optimization"]["stage"]
        deepspeed = import_deepspeed(self.world)
        self.module = cast_parameters(module, dtype).to(self.world.device)
        params = [param for _, param in trainable_parameters(self.module)]
        self._optimizer = (
            GuardedAdamW(params, trainer.optim)  # DeepSpeed has no guard at stage 0
            if stage == 0
            else torch.optim.AdamW(params, **adamw_options(trainer.optim))
        )
        with _quiet_memory_report():
            self._engine, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=self._optimizer,
                config=config,
                dist_init_required=False,
            )
        self._zero = _Zero(self._engine.optimizer, stage, self.world.rank)
        init_adamw_state(self._optimizer, self._zero.flats)
        self._gathered = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._engine(*args, **kwargs)
        if not isinstance(output, torch.Tensor | tuple | list | dict):
            raise TrainEngineError(
                f"the module returned {type(output).__name__}, in which DeepSpeed looks for no "
                "tensors: return a tensor, tuple, list or dict (a NamedTuple is a tuple)."
            )
        return output

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        set_lr(self._optimizer, lr)
        self._engine.step()
        if isinstance(self._optimizer, GuardedAdamW):
            result = self._optimizer.result
        else:
            norm = float(self._engine.get_global_grad_norm())
            result = StepResult(norm, skipped=not self._engine.was_step_applied())
        self._zero.clear_gradients()
        self.num_updates += not result.skipped
        return result

    def named_parameters_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in self.module.named_parameters():
            with self._zero.gathered([param], enabled=not self._gathered):
                yield name, param.detach()

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        params = list(self.module.parameters())
        with self._zero.gathered(params, enabled=not self._gathered):
            outer, self._gathered = self._gathered, True
            self._zero.forget_trace()
            try:
                yield
            finally:
                self._gathered = outer

    def export_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in trainable_parameters(self.module):
            fragment, shape = self._zero.fragment(param), _shape(param)
            for kind in STATE_KINDS:
                whole = torch.zeros(shape.numel())
                if fragment is not None:
                    source = fragment.of(self._state_tensor(kind, fragment.flat))
                    whole.narrow(0, fragment.start, fragment.numel).copy_(source)
                key = f"{kind}/{name}"
                if self._zero.partitioned:
                    whole = self.world.all_reduce_sum(whole, f"export of {key}")
                yield key, whole.view(shape)

    def load_state(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        params = dict(trainable_parameters(self.module))
        check_state({name: _shape(param) for name, param in params.items()}, tensors)
        for name, param in params.items():
            fragment = self._zero.fragment(param)
            if fragment is None:
                continue
            for kind in STATE_KINDS:
                share = tensors[f"{kind}/{name}"].flatten()
                share = share.narrow(0, fragment.start, fragment.numel)
                fragment.of(self._state_tensor(kind, fragment.flat)).copy_(share)
        set_num_updates(self._optimizer, num_updates)
        self.num_updates = num_updates
        self._zero.refresh_low_precision()

    def close(self) -> None:
        self._engine.destroy()

    def _state_tensor(self, kind: str, flat: torch.Tensor) -> torch.Tensor:
        return flat if kind == "master" else self._optimizer.state[flat][kind]


class _Zero:
    """The parts of DeepSpeed's optimizers that have no public interface, by stage."""

    def __init__(self, optimizer: Any, stage: int, rank: int) -> None:
        self.optimizer = optimizer
        self.stage = stage
        self.rank = rank
        self.partitioned = stage > 0  # else every process holds everything

    @property
    def flats(self) -> list[torch.Tensor]:
        """The tensors that the AdamW of this process updates."""
        if self.stage == 0:
            return [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        if hasattr(self.optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
            return self.optimizer.fp32_groups_flat_partition
        return self.optimizer.single_partition_of_fp32_groups

    def fragment(self, param: nn.Parameter) -> Fragment | None:
        """Where this process keeps its share of `param`; None where it has none."""
        if self.stage == 0:
            return Fragment(param, 0, 0, param.numel())
        if self.stage == 3:
            key = self.optimizer.get_param_id(param)
            group, offset, share = self.optimizer.grad_position[key]
            start = share * self.rank
            numel = min(share, _shape(param).numel() - start)  # the last share is padded
            return Fragment(self.flats[group], offset, start, numel) if numel > 0 else None
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is None:
            return None
        master, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = self.flats[mapping.param_group_index]
        return Fragment(flat, master.start, low.start, master.numel)

    def clear_gradients(self) -> None:
        """Zero what DeepSpeed keeps of a step's gradients and would mix into the next step's.

        Measured with 0.19.8: after a skipped step with bfloat16 and offload (stages 1, 2) the
        non-finite sums stay, so every later step is skipped too; and a parameter that a step, or
        its first micro-batch, did not use gets the gradient of an earlier step (stage 3; offload).
        """
        zero = self.optimizer
        for kept in (
            getattr(zero, "accumulated_grads_in_cpu", {}).values(),  # stages 1, 2 with offload
            (flat.grad for flat in self.flats if flat.grad is not None),  # any stage with offload
        ):
            for grad in kept:
                grad.zero_()
        if self.stage in (1, 2) and hasattr(zero, "averaged_gradients"):
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        if self.stage == 3:
            zero.grad_partitions_flat_buffer.zero_()

    @torch.no_grad()
    def refresh_low_precision(self) -> None:
        """Copy the masters into the parameters of the forward pass, on every process."""
        if self.stage in (1, 2):
            self.optimizer.update_lp_params()
        if self.stage == 3:
            zero = self.optimizer
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def forget_trace(self) -> None:
        """Stage 3 records which modules run, to fetch them ahead, and stops the run where that
        differs between processes. One that generates by itself runs more or fewer than the others,
        so recording begins again after it."""
        if self.stage == 3:
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    @contextmanager
    def gathered(self, params: list[Any], *, enabled: bool) -> Iterator[None]:
        """`params` are whole while it lasts, forward passes included."""
        if self.stage != 3 or not enabled:
            yield
            return
        from deepspeed import zero

        with zero.GatheredParameters(params):
            for param in params:
                param.ds_active_sub_modules.add(_WHOLE)
            try:
                yield
            finally:
                for param in params:
                    param.ds_active_sub_modules.discard(_WHOLE)


def deepspeed_config(trainer: TrainerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Raises TrainEngineError on what cannot be combined."""
    if trainer.offload_param and trainer.zero_stage < 3:
        raise TrainEngineError(
            f"trainer.offload_param needs trainer.zero_stage=3, got {trainer.zero_stage}"
        )
    if trainer.offload_optimizer and trainer.zero_stage < 1:
        raise TrainEngineError("trainer.offload_optimizer needs trainer.zero_stage >= 1, got 0")
    low_precision = dtype == torch.bfloat16
    stage = max(trainer.zero_stage, int(low_precision))
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_NUMEL,
        "allgather_bucket_size": BUCKET_NUMEL,
        "overlap_comm": False,
    }
    if trainer.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if trainer.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": trainer.optim.max_grad_norm if stage > 0 else 0.0,
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if low_precision:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def import_deepspeed(world: World) -> Any:
    """DeepSpeed, quiet, for this world's device, without its C++ builds, in a process group.

    Raises TrainEngineError when it was imported before for another device, DistributedError when
    the process group is not that of `world`.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it reads this even for one process
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    accelerator: Any = get_accelerator()
    found = accelerator.device_name()
    if found != world.device.type:
        raise TrainEngineError(
            f"DeepSpeed runs on {found!r} in this process and the run asks for "
            f"{world.device.type!r}: unset DS_ACCELERATOR, or import deepspeed later."
        )
    # The shared-memory collectives take minutes to compile at first use; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ensure_process_group(world)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextmanager
def _quiet_memory_report() -> Iterator[None]:
    """DeepSpeed's bfloat16 optimizer prints memory figures while it is built, each after a full
    garbage collection, which takes seconds unless the objects alive now are left out."""
    gc.freeze()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.unfreeze()


def _shape(param: nn.Parameter) -> torch.Size:
    return getattr(param, "ds_shape", param.shape)
