"""Loading weights into a running vLLM engine, and what vLLM leaves to its caller.

vLLM 0.32 reloads layer by layer into the tensors its kernels and graphs already hold. Three things
are not mended by it: on a CPU a tied head goes on multiplying with the packed copy of its old
weight (6 nats off, no error), the prefix cache survives (5 nats off), and a load that breaks off
leaves layers on the meta device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rlalign.rollout.digest import WeightDigest
from rlalign.rollout.engine import EngineError

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # of the names in PEFT's files


def load(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Load a whole policy under HF names. Whatever vLLM raises passes; `roll_back` then."""
    _worker(engine).reload_weights(weights_iterator=iter(weights.items()))
    _after_load(engine)


def load_folder(engine: Any, model_path: str) -> None:
    """Load the weights of a model folder. Whatever vLLM raises passes."""
    _worker(engine).reload_weights(weights_path=model_path)
    _after_load(engine)


def roll_back(engine: Any, weights: dict[str, torch.Tensor] | None, model_path: str) -> None:
    """After a `load` that broke off: load `weights`, or the model folder where there are none."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    worker = _worker(engine)
    # Ends the broken load, or what it had taken in would count as part of the next one.
    finalize_layerwise_reload(worker.model_runner.model, worker.model_runner.model_config)
    if weights is None:
        worker.reload_weights(weights_path=model_path)
    else:
        worker.reload_weights(weights_iterator=iter(weights.items()))
    _after_load(engine)


def adapter_digest(folder: Path) -> str:
    """The digest of the adapter in `folder`, as it is read there. Raises EngineError for one that
    cannot be read or is not finite."""
    digest = WeightDigest()
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is not a mapping
                tensor = file.get_tensor(name)
                if not bool(tensor.isfinite().all()):
                    raise EngineError(f"{name} of the adapter is not finite: the policy diverged")
                digest.add(name.removeprefix(ADAPTER_PREFIX), tensor)
    # torch cannot compute with every dtype that a file may hold.
    except (SafetensorError, OSError, RuntimeError) as error:
        raise EngineError(f"the adapter in {folder} cannot be read: {error}") from error
    return digest.hexdigest()


def runner(engine: Any) -> Any:
    """vLLM's model runner in this process."""
    return _worker(engine).model_runner


def _worker(engine: Any) -> Any:
    return engine.model_executor.driver_worker


def _after_load(engine: Any) -> None:
    _repack_heads(runner(engine).model)
    if not engine.reset_prefix_cache():
        raise EngineError("vLLM keeps the prefix cache of the old weights: a request is running")


def _repack_heads(model: torch.nn.Module) -> None:
    """Renew the copy that a head multiplies with. vLLM renews those of the layers it loads, and a
    tied head is never loaded: its weight is the embedding's. On a GPU nothing is packed, and
    nothing happens."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
