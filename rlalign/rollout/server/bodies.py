"""What a client may send: every field has a type and a range, and nothing else is taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
MAX_SEQUENCES = 65_536  # of one call
MAX_TENSORS = 1_000_000  # of one update
Wrong = Field(fail_fast=True)  # one reason is enough: a list of millions would have as many
TokenIds = Annotated[list[TokenId], Wrong]
Size = Annotated[int, Field(ge=0, lt=2**48)]
Length = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class AcquireBody(Body):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    kind: Literal["full", "lora"] = "full"
    ttl_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    wait_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    priority: Annotated[float, Field(ge=0.001, le=1000)] = 1.0


class SharedTensor(Body):
    """A tensor in one of the storages of an update that comes by `ipc`."""

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    shape: Annotated[list[Size], Wrong, Field(max_length=16)]
    stride: Annotated[list[Size], Wrong, Field(max_length=16)]
    offset: Size
    storage: Size


class WeightsBody(Body):
    version: Annotated[int, Field(ge=0, lt=2**53)]
    in_flight: Literal["wait", "abort", "keep"] = "wait"
    channel: Literal["files", "group", "ipc"] = "files"  # of rlalign.rollout.channels
    backend: Literal["gloo", "nccl"] = "gloo"
    port: Annotated[int, Field(ge=1, le=65535)] = 1
    group: Annotated[str, Field(max_length=64)] = ""
    update: Annotated[str, Field(max_length=64)] = ""
    storages: Annotated[list[list[str | int | bool]], Wrong, Field(max_length=MAX_TENSORS)] = []
    tensors: Annotated[list[SharedTensor], Wrong, Field(max_length=MAX_TENSORS)] = []

    @property
    def fields_of_channel(self) -> set[str]:
        """What the engine is told."""
        if self.channel == "group":
            return {"backend", "port", "group", "update"}
        return {"storages", "tensors"} if self.channel == "ipc" else set()

    @model_validator(mode="after")
    def _places(self) -> WeightsBody:
        strange = [t.name for t in self.tensors if t.storage >= len(self.storages)]
        if strange:
            raise ValueError(f"{strange[0]!r} lies in a storage that is not listed")
        return self


class Params(Body):
    """`SamplingParams` of rlalign.rollout.engine."""

    max_completion_length: Length
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    stop_token_ids: Annotated[TokenIds, Field(max_length=1000)] = []
    ignore_eos: bool = False
    num_top: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Prompt(Body):
    ids: Annotated[TokenIds, Field(min_length=1)]
    seeds: Annotated[list[Seed], Wrong, Field(min_length=1, max_length=MAX_SEQUENCES)]
    max_completion_length: Length | None = None  # None: as in Params
    params: Params | None = None  # None: those of the call


class DrawBody(Body):
    requests: Annotated[list[Prompt], Wrong, Field(min_length=1, max_length=MAX_SEQUENCES)]
    params: Params

    @model_validator(mode="after")
    def _few_enough(self) -> DrawBody:
        count = sum(len(request.seeds) for request in self.requests)
        if count > MAX_SEQUENCES:
            raise ValueError(f"{count} sequences in one call; at most {MAX_SEQUENCES} may be")
        return self


class ScoreBody(Body):
    sequences: Annotated[
        list[Annotated[TokenIds, Field(min_length=1)]], Wrong, Field(max_length=MAX_SEQUENCES)
    ]
