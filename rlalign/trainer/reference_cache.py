"""Reference log-probs of a whole data set, computed once and kept.

Where every sequence that will train is known before the first step, so are its log-probs under the
reference, which is the policy as it starts. They are computed then, by the same forward pass that
the policy trains with (rho = ln pi - ln pi_ref must not measure two numeric paths), and no
reference model is loaded at all. The file lies in `$RLALIGN_CACHE/reference` under a digest of all
that decides the numbers: the weights, the tokens of every sequence, temperature, dtype and path.

Sums that the data gives (`ref_logps`) are compared with ours on a probe of rows, at most

    |given - sum_t logp_t| < 0.05 sqrt(T)        T tokens; what rounding in bfloat16 comes to

apart: tokens, template or end of sequence that are not the data's own show here and nowhere else.

Shapes: B rows, T completion columns, S different sequences, N completion tokens of all of them,
K bytes of a key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError

from rlalign.config import Config
from rlalign.errors import RlalignError
from rlalign.models.building import default_cache_dir
from rlalign.rollout.digest import WeightDigest
from rlalign.tasks import ScoredSet
from rlalign.trainer.batch import bare_batch
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.policy import Policy
from rlalign.trainer.token_likelihood import batch_logp
from rlalign.types import TrainBatch

KEY_BYTES = 16
NUM_PROBE = 32  # rows whose given sums are compared
PROBE_TOLERANCE = 0.05  # nats, times the root of the number of tokens
CHUNK = 8  # micro-batches of each process between two steps of the progress bar

log = logging.getLogger(__name__)


class ReferenceLogpError(RlalignError, ValueError):
    """The reference cannot judge the data; the message names the completion and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sequence of the data, prompt and completion; `given` is the data's own sum."""

    sequence: tuple[int, ...]
    length: int  # of the completion
    given: float | None
    prompt_id: str
    index: int

    @property
    def key(self) -> bytes:
        return sequence_key(self.sequence, self.length)


class ReferenceLogps:
    """Per-token log-probs of many sequences: `logp_N` end to end, `start_of` a sequence's key."""

    def __init__(self, start_of: Mapping[bytes, int], logp_N: torch.Tensor) -> None:
        self._start_of, self._logp_N = start_of, logp_N

    def of(self, batch: TrainBatch) -> torch.Tensor:
        """float32 [B, T], 0 beyond a completion. KeyError for a sequence that is not among them."""
        logp_BT = torch.zeros(batch.mask_BT.shape)
        lengths = batch.completion_len_B.tolist()
        for b, (sequence, length) in enumerate(zip(batch.sequences, lengths, strict=True)):
            start = self._start_of[sequence_key(sequence, length)]
            logp_BT[b, :length] = self._logp_N[start : start + length]
        return logp_BT


def reference_logps(
    scored: ScoredSet, policy: Policy, engine: TrainEngine, config: Config, world: World
) -> ReferenceLogps:
    """The log-probs of all completions of `scored` by `policy`, which must not have been trained
    yet; from the cache where they are there. Every process calls this.

    Raises ReferenceLogpError where they are not finite, where the data's `ref_logps` are others,
    and where the cache cannot be written.
    """
    entries = list(_entries(scored))
    digest = cache_digest(entries, weights_digest(policy, engine), config, world)
    path = default_cache_dir() / "reference" / f"{digest}.safetensors"
    stored = _load(path, world)
    given = [entry for entry in entries if entry.given is not None]
    if given and config.task.scored.check_ref_logps:
        probe = given[:: -(-len(given) // NUM_PROBE)]
        found = stored or _compute(probe, engine, config, world, "probe of ref_logps")
        _check_given(probe, found, config)
    if stored is not None:
        return stored
    with world.agreed("opening the cache of reference log-probs"), _kept_in(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    computed = _compute(entries, engine, config, world, "reference log-probs (once)")
    with world.agreed("writing the reference log-probs"), _kept_in(path.parent):
        if world.is_main:
            _write(path, computed)
    return computed


def sequence_key(sequence: Sequence[int], length: int) -> bytes:
    """What a sequence whose last `length` tokens are the completion is found by."""
    tokens = np.asarray([length, *sequence], dtype=np.int64)
    return hashlib.blake2b(tokens.tobytes(), digest_size=KEY_BYTES).digest()


def weights_digest(policy: Policy, engine: TrainEngine) -> str:
    """Of the weights that a rollout engine would be sent; with new adapters, the base model's."""
    digest = WeightDigest()
    with engine.full_parameters():
        for name, tensor in policy.named_rollout_weights():
            digest.add(name, tensor)
    return digest.hexdigest()


def cache_digest(entries: Iterable[Entry], weights: str, config: Config, world: World) -> str:
    """32 hex digits over all that decides the numbers, whatever the order of the sequences."""
    path = {
        "weights": weights,
        "temperature": config.rollout.temperature,
        "dtype": config.model.dtype,
        "kernels": config.kernels.backend,
        "packing": config.trainer.packing,
        "device": world.device.type,
    }
    state = hashlib.sha256(json.dumps(path, sort_keys=True).encode())
    for key in sorted({entry.key for entry in entries}):
        state.update(key)
    return state.hexdigest()[:32]


def _entries(scored: ScoredSet) -> Iterator[Entry]:
    for prompt in scored.prompts:
        found = scored[prompt.id]
        for sample, given in zip(found.group.samples, found.ref_logps, strict=True):
            sequence = prompt.token_ids + sample.token_ids
            yield Entry(sequence, len(sample.token_ids), given, prompt.id, sample.index)


def _compute(
    entries: Sequence[Entry], engine: TrainEngine, config: Config, world: World, title: str
) -> ReferenceLogps:
    start_of: dict[bytes, int] = {}
    parts: list[torch.Tensor] = []
    total = 0
    new = list({entry.key: entry for entry in entries}.values())
    chunks = list(_chunks(new, CHUNK * world.size * config.trainer.micro_batch_tokens))
    console = Console(stderr=True)
    for chunk in track(chunks, title, console=console, disable=not world.is_main):
        batch = bare_batch([e.sequence for e in chunk], [e.length for e in chunk])
        logp_BT = batch_logp(engine, batch, config, world)
        for entry, logp_T in zip(chunk, logp_BT, strict=True):
            start_of[entry.key], total = total, total + entry.length
            parts.append(_finite(entry, logp_T[: entry.length]))
    return ReferenceLogps(start_of, torch.cat(parts))


def _chunks(entries: Sequence[Entry], num_tokens: int) -> Iterator[list[Entry]]:
    """In order, so that the completions of a prompt stay together, of about `num_tokens`."""
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        if chunk and size + len(entry.sequence) > num_tokens:
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += len(entry.sequence)
    if chunk:
        yield chunk


def _finite(entry: Entry, logp_T: torch.Tensor) -> torch.Tensor:
    wrong = (~torch.isfinite(logp_T)).nonzero().flatten().tolist()
    if wrong:
        raise ReferenceLogpError(
            f"the reference assigns {float(logp_T[wrong[0]])} to completion {entry.index} of "
            f"{entry.prompt_id} (token {wrong[0]} of {entry.length}): support assumption violated "
            "(wrong tokenizer or banned tokens). Drop that completion, or use the model and "
            "tokenizer that the data was made for"
        )
    return logp_T


def _check_given(probe: Sequence[Entry], found: ReferenceLogps, config: Config) -> None:
    batch = bare_batch([e.sequence for e in probe], [e.length for e in probe])
    sums = found.of(batch).double().sum(1).tolist()
    for entry, ours in zip(probe, sums, strict=True):
        assert entry.given is not None
        gap, allowed = abs(entry.given - ours), PROBE_TOLERANCE * math.sqrt(entry.length)
        if not gap < allowed:
            raise ReferenceLogpError(
                f"ref_logps were computed with another tokenisation: probe mismatch {gap:.3f} nat. "
                f"Completion {entry.index} of {entry.prompt_id} has {entry.given:.3f}, the sum "
                f"over its {entry.length} tokens is {ours:.3f} here (allowed: {allowed:.3f} apart)."
                " They must come from model.path with its tokenizer and template, end of sequence "
                f"included, at temperature {config.rollout.temperature:g}. Mend or drop the column,"
                " or set task.scored.check_ref_logps=false"
            )


def _load(path: Path, world: World) -> ReferenceLogps | None:
    """What the main process finds there, on every process; None where there is no whole file."""
    payload = b""
    with world.agreed("reading the reference log-probs"):
        if world.is_main and path.is_file():
            payload = path.read_bytes()
    payload = world.broadcast_bytes(payload, "reference log-probs")
    if not payload:
        return None
    try:
        tensors = safetensors.torch.load(payload)
        keys = [bytes(row) for row in tensors["key_SK"].numpy()]
        starts = tensors["start_S"].tolist()
        found = ReferenceLogps(dict(zip(keys, starts, strict=True)), tensors["logp_N"])
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s): the log-probs are computed again", path, error)
        return None
    log.info("reference log-probs from %s", path)
    return found


def _write(path: Path, found: ReferenceLogps) -> None:
    """Whole or not at all: under a name of its own, synced, then renamed."""
    keys = b"".join(found._start_of)
    tensors = {
        "key_SK": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, KEY_BYTES),
        "start_S": torch.tensor(list(found._start_of.values()), dtype=torch.long),
        "logp_N": found._logp_N,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(safetensors.torch.save(tensors))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReferenceLogpError(
            f"the reference log-probs cannot be kept in {folder} ({error}): set RLALIGN_CACHE to a "
            "folder that can be written"
        ) from error
