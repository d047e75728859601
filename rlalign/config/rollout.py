# ruff: noqa: RUF009  (option() and section() return dataclass fields)
"""How samples are made."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from rlalign.config.diffusion import DiffusionConfig
from rlalign.config.fields import option, section
from rlalign.config.flow import FlowConfig
from rlalign.config.serving import ServeTesttimeConfig
from rlalign.config.tree import TokenTreeConfig


@dataclass
class VllmConfig:
    """Options of the vLLM engine."""

    gpu_memory_utilization: float = option(
        0.4, "Share of GPU memory for weights and cache.", gt=0, le=1
    )
    kv_cache_gib: int = option(1, "KV cache on a CPU, whole GiB.", ge=1)
    max_num_seqs: int = option(256, "Sequences decoded together.", ge=1)
    max_model_len: int | None = option(
        None, "Longest sequence; unset: prompt plus completion limit.", ge=1
    )
    enforce_eager: bool | None = option(
        None, "No graph capture; unset: true on a CPU, false on a GPU."
    )
    block_size: int | None = option(
        None, "Prefix-cache block, tokens; unset: 32 on a CPU, vLLM's own on a GPU."
    )
    enable_prefix_caching: bool = option(True, "Share the prompt's cache within a group.")
    sleep_mode: bool = option(True, "Free the GPU between rollouts.")
    timeout_s: float = option(
        3600.0, "Deadline of one batch of rollouts in the engine, seconds.", gt=0
    )
    max_loras: int = option(0, "LoRA jobs that a server hosts at a time; 0: none.", ge=0)
    max_lora_rank: int = option(16, "Highest rank of their adapters, a power of two.", ge=8, le=512)


@dataclass
class ServerConfig:
    """The rollout server that a run uses, and its lease there (docs/server.md)."""

    name: str = option("default", "As given to `rlalign serve`; or the path of its file.")
    ttl_s: float = option(
        30.0, "The lease ends when the run is silent for so long, seconds.", ge=1, le=3600
    )
    wait_s: float = option(
        0.0, "How long to wait for another job's lease to end, seconds.", ge=0, le=86400
    )
    timeout_s: float = option(3600.0, "Deadline of one batch of rollouts, seconds.", gt=0)
    channel: str = option(
        "auto",
        "How weights get there (rlalign/rollout/channels); auto: memory where the server's folder "
        "is seen, else upload. gloo, nccl and ipc are for whole policies.",
        choices=("auto", "memory", "upload", "gloo", "nccl", "ipc"),
    )
    in_flight: str = option(
        "wait",
        "Sequences that run when new weights come: they end under the old ones (wait), or go on "
        "under the new ones (keep: no waiting, but a run no longer repeats itself).",
        choices=("wait", "keep"),
    )
    priority: float = option(
        1.0, "Twice another job's: twice its tokens while both wait.", ge=0.001, le=1000
    )


@dataclass
class ServeConfig:
    """`rlalign serve`: one engine for many jobs."""

    model: str = option(MISSING, "HF folder or hub id, or `mini:<task>` for a model built here.")
    seed: int = option(0, "Of a model that is built here.", ge=0)
    name: str = option("default", "Jobs find the server by it: rollout.server.name.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(0, "Port to listen on; 0: a free one.", ge=0, le=65535)
    allow_plain_http: bool = option(
        False, "Listen on an address that others can reach, without TLS: tokens can be read."
    )
    tls_certificate: str | None = option(None, "PEM file; with tls_key, the server speaks HTTPS.")
    tls_key: str | None = option(None, "PEM file of the certificate's key, without a passphrase.")
    dtype: str = option(
        "float32", "Of weights and activations.", choices=("float32", "bfloat16", "float16")
    )
    device: str = option("auto", "Where the engine runs.", choices=("auto", "cpu", "cuda"))
    max_len: int | None = option(
        None,
        "Longest sequence, prompt and completion, tokens; unset: the model's context, at most "
        "2048.",
        ge=2,
    )
    num_threads: int = option(0, "Threads of the engine on a CPU; 0: torch's own.", ge=0)
    start_timeout_s: float = option(600.0, "Deadline of the engine's start, seconds.", gt=0)
    stall_s: float = option(
        120.0, "An engine that is silent for so long hangs: it is started again.", ge=10
    )
    max_queued: int = option(131072, "Sequences of one job that wait or run.", ge=1)
    max_in_flight: int | None = option(
        None,
        "Sequences of one job in the engine at a time; below vllm.max_num_seqs, others find room.",
        ge=1,
    )
    max_requests: int = option(1024, "Requests that are open at once.", ge=1)
    max_body_mib: int = option(64, "Largest request.", ge=1)
    max_weights_mib: int = option(16384, "Largest update that comes over HTTP.", ge=1)
    vllm: VllmConfig = section(VllmConfig, "vLLM's own options.")
    testtime: ServeTesttimeConfig = section(ServeTesttimeConfig, "Models called NAME@METHOD.")


@dataclass
class RolloutConfig:
    """How samples are made."""

    engine: str = option(
        "vllm",
        "hf shares the trainer's parameters; vllm runs beside it; server: see `rlalign serve`; "
        "none: nothing is sampled, with task.completions=dataset; flow: images of a flow model; "
        "masked_diffusion: a diffusion language model, sampled by the trainer's own parameters.",
        choices=("hf", "vllm", "server", "none", "flow", "masked_diffusion"),
    )
    max_completion_length: int = option(256, "Longest completion, tokens.", ge=1)
    temperature: float = option(
        1.0, "Sampling temperature; the trainer's log-probs use the same.", gt=0
    )
    top_p: float = option(
        1.0, "Nucleus; 1 is off. Below 1 the ratio is no longer exact.", gt=0, le=1
    )
    top_k: int = option(0, "Keep the k likeliest tokens; 0 is off.", ge=0)
    max_batch_size: int = option(256, "Sequences the hf engine decodes together.", ge=1)
    max_lag: int = option(
        0,
        "Rollout batches drawn ahead while the trainer trains, so samples are up to as many policy "
        "versions old; above 0 needs engine=server.",
        ge=0,
    )
    oversample: float = option(
        1.0,
        "Groups in flight, as a multiple of those that a batch needs: it takes the first that are "
        "finished, the others go into the next. Above 1 needs max_lag and server.in_flight=keep.",
        ge=1,
        le=2,
    )
    logp_tolerance: float = option(
        0.05,
        "Largest engine/trainer log-prob difference on the check sequence after a weight update.",
        gt=0,
    )
    vllm: VllmConfig = section(VllmConfig, "vLLM's own options.")
    server: ServerConfig = section(ServerConfig, "The rollout server to use.")
    tree: TokenTreeConfig = section(TokenTreeConfig, "Trees of tokens in place of flat samples.")
    flow: FlowConfig = section(FlowConfig, "The sampler of a flow model.")
    diffusion: DiffusionConfig = section(
        DiffusionConfig, "The sampler of a diffusion language model."
    )
