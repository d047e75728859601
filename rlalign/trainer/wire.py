"""Scored groups as bytes, so that processes can exchange them without pickle.

Layout: the length of a JSON header (8 bytes, little-endian), the header, then the token ids (int32)
and log-probs (float64) of all samples end to end. Every number comes back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rlalign.types import Group, Prompt, Sample, Scores, Tree, VersionSpan

LENGTH_BYTES = 8
REALS = ("reward_N", "logp_N")  # of a tree; the others are integers


def encode(groups: Sequence[Group], scores: Sequence[Scores], figures: dict[str, Any]) -> bytes:
    """`scores` holds one entry a group; `figures` is anything more that JSON can hold."""
    samples = [sample for group in groups for sample in group.samples]
    header = {
        "figures": figures,
        "groups": [len(group.samples) for group in groups],
        "trees": [_tree_header(group) for group in groups],
        "samples": [_sample_header(sample) for sample in samples],
        "scores": [_scores_header(score) for score in scores],
    }
    text = json.dumps(header).encode()
    tokens = np.fromiter((t for s in samples for t in s.token_ids), dtype=np.int32)
    logps = np.fromiter((x for s in samples for x in s.logp), dtype=np.float64)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + tokens.tobytes() + logps.tobytes()


def decode(
    payload: bytes, prompts: Sequence[Prompt]
) -> tuple[list[Group], list[Scores], dict[str, Any]]:
    """The inverse of `encode`, given the prompts of its groups in order."""
    header = _header(payload)
    start = LENGTH_BYTES + int.from_bytes(payload[:LENGTH_BYTES], "little")
    total = sum(sample["length"] for sample in header["samples"])
    tokens = np.frombuffer(payload, np.int32, total, start).tolist()
    logps = np.frombuffer(payload, np.float64, total, start + 4 * total).tolist()
    samples = _samples(header["samples"], tokens, logps)
    groups = [
        Group(prompt, tuple(next(samples) for _ in range(size)), **_tree(tree))
        for prompt, size, tree in zip(prompts, header["groups"], header["trees"], strict=True)
    ]
    return groups, [_scores(entry) for entry in header["scores"]], header["figures"]


def _header(payload: bytes) -> dict[str, Any]:
    end = LENGTH_BYTES + int.from_bytes(payload[:LENGTH_BYTES], "little")
    return json.loads(payload[LENGTH_BYTES:end])


def _sample_header(sample: Sample) -> dict[str, Any]:
    return {
        "prompt_id": sample.prompt_id,
        "index": sample.index,
        "length": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "spans": [[span.num_tokens, span.version] for span in sample.spans],
        "text": sample.text,
        "parent": sample.parent,
        "source_id": sample.source_id,
        "steps": sample.steps,
    }


def _samples(entries: list[dict[str, Any]], tokens: list, logps: list) -> Iterator[Sample]:
    at = 0
    for entry in entries:
        end = at + entry["length"]
        yield Sample(
            prompt_id=entry["prompt_id"],
            index=entry["index"],
            token_ids=tuple(tokens[at:end]),
            logp=tuple(logps[at:end]),
            finish_reason=entry["finish_reason"],
            spans=tuple(VersionSpan(count, version) for count, version in entry["spans"]),
            text=entry["text"],
            parent=entry["parent"],
            source_id=entry["source_id"],
            steps=tuple(entry["steps"]),
        )
        at = end


def _tree_header(group: Group) -> dict[str, Any] | None:
    if group.tree is None:
        return None
    tensors = {name: getattr(group.tree, name).tolist() for name in Tree.__slots__}
    return {"paths": group.paths, **tensors}


def _tree(header: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of a group."""
    if header is None:
        return {}
    tensors = {
        name: torch.tensor(header[name], dtype=torch.float32 if name in REALS else torch.int64)
        for name in Tree.__slots__
    }
    return {"tree": Tree(**tensors), "paths": tuple(map(tuple, header["paths"]))}


def _scores_header(scores: Scores) -> dict[str, Any]:
    # float32 values are exact in the float64 that JSON carries; NaN is Python's JSON extension.
    return {
        "reward": scores.reward_B.tolist(),
        "acc": scores.acc_B.tolist(),
        "by_function": {name: value.tolist() for name, value in scores.by_function.items()},
        "errors": dict(scores.errors),
    }


def _scores(entry: dict[str, Any]) -> Scores:
    return Scores(
        reward_B=torch.tensor(entry["reward"]),
        acc_B=torch.tensor(entry["acc"]),
        by_function={name: torch.tensor(value) for name, value in entry["by_function"].items()},
        errors=entry["errors"],
    )
