"""The training engine: forward, backward, optimizer step, and the state that a checkpoint keeps.

The protocol is the same for plain torch in one process (`TorchEngine`, here) and for DeepSpeed at
any ZeRO stage on any number of processes (`DeepSpeedEngine`). Both obey, for every step,

    g = sum over processes and micro-batches of d loss / d theta    (a loss is a share, not a mean)
    g <- g * min(1, max_grad_norm / (|g| + 1e-6))                   (as torch's clip_grad_norm_)
    theta <- AdamW(theta, g)                                        (arXiv:1711.05101, algorithm 2)

so a caller divides the work as it likes and the update stays the same. A trainable parameter that a
step did not use has a gradient of zero. If |g| is not finite, no process changes weights or
optimizer state.

State travels as float32 tensors named `<kind>/<parameter>`, with kind one of `master` (the
parameter in full precision), `exp_avg` and `exp_avg_sq` (the AdamW moments), one whole tensor at a
time, plus the number of updates made: the same for every engine, ZeRO stage and number of
processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from rlalign.errors import RlalignError
from rlalign.trainer.distributed import World

if TYPE_CHECKING:
    from rlalign.config.schema import OptimConfig

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")


class TrainEngineError(RlalignError):
    """The engine cannot be built or was misused; the message names the cause and the fix."""


class EngineStateError(TrainEngineError):
    """A saved state does not fit this engine; the message names the tensor."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did.

    >>> StepResult(grad_norm=0.73, skipped=False)
    """

    grad_norm: float  # global norm before clipping; not finite where the step was skipped
    skipped: bool  # a gradient was not finite: nothing changed, on any process


class TrainEngine(Protocol):
    """Trains `module`. Every method is collective: all processes call it, in the same order."""

    module: nn.Module
    world: World
    num_updates: int  # optimizer steps that changed the weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`module(*args, **kwargs)`, ready for `backward`."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, this process's share (scalar) of the global loss.

        Call it for any number of micro-batches before `step`; with several processes, equally often
        on each of them and each time through the same parameters (a share may be a loss of zero):
        ZeRO 2 and 3 exchange gradients within every call.
        """
        ...

    def step(self, lr: float) -> StepResult:
        """Clip, update the weights at rate `lr`, clear the gradient; or skip, see StepResult."""
        ...

    def named_parameters_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, whole, in the dtype of the forward pass; each valid until the next."""
        ...

    def full_parameters(self) -> AbstractContextManager[None]:
        """While it lasts, `module` holds every parameter whole, to read: generate, publish,
        save."""
        ...

    def export_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The training state, one float32 CPU tensor at a time, in an order all engines share."""
        ...

    def load_state(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take a state that any engine exported. Raises EngineStateError, with nothing changed."""
        ...

    def close(self) -> None: ...


class TorchEngine:
    """One process, plain torch. With bfloat16 it keeps float32 masters and accumulates in float32.

    `dtype` is that of the forward pass: the module's parameters are cast to it in place.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        *,
        dtype: torch.dtype = torch.float32,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        if self.world.size > 1:
            raise TrainEngineError(
                f"the torch engine trains on one process, got {self.world.size}: set "
                "trainer.engine=deepspeed, or start without torchrun."
            )
        self.module = cast_parameters(module, dtype).to(self.world.device)
        self.num_updates = 0
        self._params = dict(trainable_parameters(module))
        self._masters = {
            name: param if param.dtype == torch.float32 else param.detach().float()
            for name, param in self._params.items()
        }
        self._optimizer = GuardedAdamW(self._masters.values(), optim)
        init_adamw_state(self._optimizer, self._masters.values())
        for name, param in self._params.items():
            if self._masters[name] is not param:
                param.register_post_accumulate_grad_hook(_move_grad_to(self._masters[name]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> StepResult:
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        result = self._optimizer.result
        if not result.skipped:
            self._refresh_low_precision()
            self.num_updates += 1
        return result

    def named_parameters_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in self.module.named_parameters():
            yield name, param.detach()

    def full_parameters(self) -> AbstractContextManager[None]:
        return nullcontext()

    def export_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, master in self._masters.items():
            for kind in STATE_KINDS:
                yield f"{kind}/{name}", self._state_tensor(kind, master).detach().cpu().clone()

    def load_state(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        check_state({name: param.shape for name, param in self._params.items()}, tensors)
        for name, master in self._masters.items():
            for kind in STATE_KINDS:
                self._state_tensor(kind, master).data.copy_(tensors[f"{kind}/{name}"])
        set_num_updates(self._optimizer, num_updates)
        self.num_updates = num_updates
        self._refresh_low_precision()

    def close(self) -> None:
        self._optimizer.state.clear()

    def _state_tensor(self, kind: str, master: torch.Tensor) -> torch.Tensor:
        return master if kind == "master" else self._optimizer.state[master][kind]

    @torch.no_grad()
    def _refresh_low_precision(self) -> None:
        for name, param in self._params.items():
            if self._masters[name] is not param:
                param.copy_(self._masters[name])


def _move_grad_to(master: torch.Tensor):
    def move(param: torch.Tensor) -> None:
        assert param.grad is not None
        grad = param.grad.float()
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        param.grad = None

    return move


def trainable_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters to train, in the module's order. Raises TrainEngineError when there are
    none."""
    found = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    if not found:
        raise TrainEngineError(
            "no parameter of the module requires a gradient, so there is nothing to train: check "
            "model.lora.target_modules or what was frozen."
        )
    yield from found


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its parameters in `dtype`, in place; buffers (rotary tables) keep theirs."""
    for param in module.parameters():
        if param.is_floating_point() and param.dtype != dtype:
            param.data = param.data.to(dtype)
    return module


def adamw_options(optim: OptimConfig) -> dict[str, Any]:
    """Keyword arguments of torch's AdamW; the rate is given anew at each step."""
    return {
        "lr": optim.learning_rate,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_eps,
        "weight_decay": optim.weight_decay,
        "fused": True,
    }


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose `step` clips the gradient first, and does nothing when its norm is not finite."""

    def __init__(self, params: Iterable[torch.Tensor], optim: OptimConfig) -> None:
        super().__init__(list(params), **adamw_options(optim))
        self.max_grad_norm = optim.max_grad_norm
        self.result = StepResult(math.nan, skipped=True)

    def step(self, closure: Any = None) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        grad_norm = clip_gradients(params, self.max_grad_norm)
        self.result = StepResult(grad_norm, skipped=not math.isfinite(grad_norm))
        if not self.result.skipped:
            super().step(closure)


def init_adamw_state(optimizer: torch.optim.AdamW, params: Iterable[torch.Tensor]) -> None:
    """Create the state that torch would create at the first step, to save or load it before."""
    for param in params:
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
        }


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(num_updates)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(params: Iterable[torch.Tensor], max_grad_norm: float) -> float:
    """Global norm of the gradients of `params`, which are scaled down to `max_grad_norm` (0: not).

    Missing gradients become zero. A norm that is not finite leaves the gradients as they are.
    """
    params = list(params)
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    # torch sums float32 squares one after the other on a CPU: 4e-6 off at a million elements.
    dtype = torch.float64 if params[0].device.type == "cpu" else torch.float32
    norms = [torch.linalg.vector_norm(p.grad, dtype=dtype) for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    grad_norm = float(norm)
    if max_grad_norm > 0 and math.isfinite(grad_norm):
        torch.nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
    return grad_norm


def check_state(shapes: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise EngineStateError unless `tensors` are the state of just the parameters in `shapes`."""
    expected = {f"{kind}/{name}" for name in shapes for kind in STATE_KINDS}
    missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unknown:
        raise EngineStateError(
            f"the saved state has {len(missing)} tensors too few (first: {missing[:1]}) and "
            f"{len(unknown)} too many (first: {unknown[:1]}): it belongs to another model, or to "
            "another choice of trainable parameters (LoRA or full)."
        )
    for key in sorted(expected):
        shape = shapes[key.split("/", 1)[1]]
        if tuple(tensors[key].shape) != tuple(shape):
            raise EngineStateError(
                f"{key} was saved with shape {tuple(tensors[key].shape)}, the model has "
                f"{tuple(shape)}"
            )
