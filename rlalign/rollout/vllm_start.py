"""Starting and stopping vLLM inside this process, leaving the process as it was.

vLLM is written to own its process. Around its start everything global that it changes and the
trainer needs is put back: environment variables (LOCAL_WORLD_SIZE, LD_PRELOAD, ... would reach
every child process), the state of all random generators, `torch.set_num_threads`. At its end the
default process group of torch.distributed is kept, which vLLM would destroy under the trainer.

CPU and GPU differ in `_cpu_options` and `_gpu_options` alone. The GPU's were written from vLLM's
source (0.32) and have not been run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from rlalign.config.schema import VllmConfig
from rlalign.rollout import vllm_lora_cpu
from rlalign.rollout.engine import EngineError

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

# What vLLM reads from the environment, in force while it is imported and started.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine steps in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
FIRST_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
DEFAULT_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR"}  # unless the user asks for more
IGNORED_ENVIRONMENT = ("VLLM_CPU_KVCACHE_SPACE",)  # would override kv_cache_gib without a word
KNOWN_VLLM = "0.32."  # whose inner parts vllm_decode_cpu.py and vllm_norm_cpu.py replace
CPU_BLOCK_SIZE = 32  # the smallest that the CPU kernels take: shortest shared prefix that is found
CPU_BATCHED_TOKENS = 8192  # prompt tokens of one step


def start(
    model_path: str,
    cfg: VllmConfig,
    *,
    dtype: str,
    max_model_len: int,
    seed: int,
    device: str,
    in_turn: bool = False,
) -> LLMEngine:
    """A vLLM engine in this process that takes and gives token ids only. `in_turn`: each step is
    over before the next begins, and vLLM's first runner runs them (vllm_choose.py).

    Raises EngineError when vLLM is missing, was built for another device, or cannot start.
    """
    _check_machine(device)
    options = _cpu_options(cfg, max_model_len) if device == "cpu" else _gpu_options(cfg)
    options |= {"async_scheduling": False} if in_turn else {}
    with _process_kept(FIRST_RUNNER if in_turn else {}), rng_kept(device), eager(device, cfg):
        from vllm import EngineArgs, envs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        _check_build(envs.VLLM_ENABLE_V1_MULTIPROCESSING, current_platform.device_type, device)
        if cfg.max_loras and device == "cpu":
            vllm_lora_cpu.install()
        from rlalign.rollout import vllm_sampler

        vllm_sampler.install()
        args = EngineArgs(
            model=model_path,
            dtype=cast(Any, dtype),
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=cfg.max_num_seqs,
            enable_prefix_caching=cfg.enable_prefix_caching,
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,  # of as many tokens as there are
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            scheduler_cls=_faster(device, cfg),
            **_lora_options(cfg),
            **options,
        )
        try:
            config = args.create_engine_config(UsageContext.LLM_CLASS)
            if device == "cpu":
                _check_head_size(config.model_config)
            return LLMEngine.from_vllm_config(config, disable_log_stats=True)
        except EngineError:
            raise
        except Exception as error:  # vLLM has no base class for these; the cause is kept
            raise EngineError(_start_failure(error, model_path, device)) from error


def empty_model(model_path: str) -> PreTrainedModel:
    """The HF model of that folder without weights, on the meta device: names, shapes, end tokens.

    Raises EngineError when the folder is missing or holds no causal language model.
    """
    if not Path(model_path).is_dir() and (Path(model_path).is_absolute() or model_path[:1] == "."):
        raise EngineError(f"there is no model folder {model_path!r}: check model.path")
    try:
        config = AutoConfig.from_pretrained(model_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"no causal language model can be read from {model_path!r}: {error}. Give the folder "
            "that save_pretrained wrote, or a hub id."
        ) from error
    with contextlib.suppress(OSError):  # a folder without one: the model's own config holds
        model.generation_config = GenerationConfig.from_pretrained(model_path)
    return model


def stop(engine: LLMEngine) -> None:
    """Release the engine's memory; another one can be started afterwards."""
    from vllm.distributed import parallel_state

    client: Any = engine.engine_core
    # vLLM's own shutdown, which this finalizer calls, destroys the default process group too.
    client._finalizer.detach()
    core = client.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    parallel_state.destroy_model_parallel()
    gc.unfreeze()  # what vLLM froze at its start could never be collected


def rng_kept(device: str) -> Any:
    """Put back torch's random state: vLLM draws from the global generators even with seeds."""
    return torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else [])


def eager(device: str, cfg: VllmConfig) -> Any:
    """Run vLLM's compiled helpers uncompiled, on a CPU in eager mode: torch.compile of the one that
    ranks log-probs costs 10 s at the first batch and wins nothing."""
    return torch.compiler.set_stance("force_eager" if enforces_eager(device, cfg) else "default")


def enforces_eager(device: str, cfg: VllmConfig) -> bool:
    return device == "cpu" if cfg.enforce_eager is None else cfg.enforce_eager


def _cpu_options(cfg: VllmConfig, max_model_len: int) -> dict[str, Any]:
    return {
        "enforce_eager": enforces_eager("cpu", cfg),
        "block_size": cfg.block_size or CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": cfg.kv_cache_gib * 2**30,
        # A prompt read in two pieces by a request with its own seed crashes the CPU engine.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, CPU_BATCHED_TOKENS),
    }


def _gpu_options(cfg: VllmConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "enforce_eager": enforces_eager("cuda", cfg),
        "gpu_memory_utilization": cfg.gpu_memory_utilization,
        "enable_sleep_mode": cfg.sleep_mode,
    }
    return options if cfg.block_size is None else options | {"block_size": cfg.block_size}


def _faster(device: str, cfg: VllmConfig) -> type | None:
    """On a CPU: put our parts in the place of vLLM's; the scheduler to use. None, and vLLM as it
    is, for another version than the parts were written for."""
    import vllm

    if device != "cpu" or not vllm.__version__.startswith(KNOWN_VLLM):
        return None
    from rlalign.rollout import vllm_decode_cpu, vllm_norm_cpu

    if enforces_eager(device, cfg):
        vllm_norm_cpu.install()
    return vllm_decode_cpu.install()


def _lora_options(cfg: VllmConfig) -> dict[str, Any]:
    if not cfg.max_loras:
        return {}
    # An adapter that is replaced stays until the sequences that began with it are done.
    return {
        "enable_lora": True,
        "max_loras": cfg.max_loras + 1,
        "max_cpu_loras": 2 * cfg.max_loras + 1,
        "max_lora_rank": cfg.max_lora_rank,
    }


def _check_machine(device: str) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            f"rollout.engine = 'vllm', but vllm is not installed: install {_extra(device)}, or use "
            "rollout.engine=hf"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "the vLLM engine was asked for a GPU, but torch finds none: use trainer.device=cpu"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        raise EngineError(
            f"this is one of {world} processes, but torch.distributed is not initialised: vLLM "
            "would set it up for one. Initialise it before the VllmEngine."
        )


def _check_build(elsewhere: bool, built_for: str, device: str) -> None:
    if elsewhere:
        raise EngineError(
            "vLLM already runs in this process with its engine in another one: create the "
            "VllmEngine before any other use of vllm"
        )
    if built_for != device:
        raise EngineError(
            f"the installed vLLM is built for {built_for!r}, the run wants {device!r}: install "
            f"{_extra(device)}"
        )


def _check_head_size(model_config: Any) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, sizes = model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes and not model_config.use_mla:
        raise EngineError(
            f"the model's attention heads have size {size}; vLLM's CPU kernels know "
            f"{', '.join(map(str, sizes))}: use the engine hf (rollout.engine=hf, --backend hf)"
        )


def _extra(device: str) -> str:
    return "'rlalign[gpu]'" if device == "cuda" else "'rlalign[cpu]'"


def _start_failure(error: Exception, model_path: str, device: str) -> str:
    text = f"vLLM could not start with model {model_path!r}: {type(error).__name__}: {error}"
    lengths = (
        "lower max_model_len (of a run rollout.vllm.max_model_len, which is, unset, "
        "task.max_prompt_length + rollout.max_completion_length; of `rlalign serve` max_len)"
    )
    if "memory" in str(error).lower():
        option = "kv_cache_gib" if device == "cpu" else "gpu_memory_utilization"
        text += f" Adjust rollout.vllm.{option}, or {lengths}."
    elif "max_model_len" in str(error):
        text += f" The model's context is shorter than the longest sequence asked for: {lengths}."
    return text


@contextlib.contextmanager
def _process_kept(more: dict[str, str]) -> Iterator[None]:
    """Put back the environment, Python's and NumPy's random generators, and torch's threads. `more`
    is in the environment too."""
    environment = dict(os.environ)
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    python_state, numpy_state = random.getstate(), np.random.get_state()
    os.environ |= ENVIRONMENT | more
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in IGNORED_ENVIRONMENT:
        os.environ.pop(name, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of vLLM's imports
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        _restore_environment(environment)


def _restore_environment(before: dict[str, str]) -> None:
    ours = {*ENVIRONMENT, *FIRST_RUNNER, *DEFAULT_ENVIRONMENT, *IGNORED_ENVIRONMENT}
    for name in set(os.environ) | set(before):
        if name.startswith("VLLM_") and name not in ours:
            continue  # notes that vLLM leaves to itself
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)
