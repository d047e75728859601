"""`rlalign decode METHOD` for language models as a function: rows of a JSONL file in, one record
each out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from rlalign.config.load import parse
from rlalign.config.testtime import SearchConfig
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Drawn, Reply, Request, SearchEngine
from rlalign.tasks.errors import TaskError
from rlalign.testtime.answers import Extract, is_right, make_extract
from rlalign.testtime.decode_rows import Record, Row, dump, held_records, missing, read_rows
from rlalign.testtime.decode_summary import Summary
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.methods import NONE, REQUIRED, Method, find_method
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.prompt import PROMPT_KEYS, Prompt
from rlalign.testtime.result import Result, failed_result
from rlalign.testtime.rewards import FunctionReward
from rlalign.testtime.run import IN_FLIGHT

OF_REWARD = "reward."  # begins overrides that are the reward's own
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class TextJob:
    """What to decode, by which method and model.

    `overrides` are key=value options of the method's config, over those of the YAML file `config`,
    or, as reward.key=value, of the reward. `small` and `experts` are the other models of
    logit-fusion. `num` and `shard` choose rows (`read_rows`), `extract` says where the answer in a
    text stands (a rule of `make_extract`; for majority also where its votes are, and there it is
    an override as well).

    >>> TextJob("majority", "mini:chain", "rows.jsonl", "out.jsonl", ["num_samples=16"], num=20)
    """

    method: str
    model: str | SearchEngine
    source: str | Path
    out: str | Path
    overrides: Sequence[str] = ()
    config: str | Path | None = None
    reward: str | Callable[..., Any] | None = None
    small: str = ""
    experts: Sequence[str] = ()
    num: int | None = None
    shard: str = ""
    extract: str | None = None
    resume: bool = False
    chat: bool | None = None
    system: str = ""
    backend: str = "hf"
    device: str = "cpu"
    dtype: str = "float32"
    in_flight: int = IN_FLIGHT


@dataclass(slots=True)
class Progress:
    """How far a run has come: `done` of `total` rows, those of an earlier run included; what the
    model generated and was asked since this one began."""

    total: int
    done: int = 0
    tokens: int = 0
    requests: int = 0


Finish = Callable[[Row, Result], None]


def decode_text(
    job: TextJob,
    *,
    on_record: Callable[[Record], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Answer each row of a JSONL file (`make_prompt`), and append its record to `job.out` as soon
    as it is ready: that of `Result.to_json`, with `method`, `prompt` and, where the row has an
    answer, `answer` and whether the text ends in it, `right`.

    A row that cannot be used or served gives a record with `error`, and the others their own.
    `resume` keeps the records without one and goes on with the other rows; the settings should be
    those of the first run.

    Raises DecodeError for what cannot be run and where something would be lost, ConfigError for
    wrong options, RewardError and ModelError for what cannot be opened; all of them before anything
    is decoded or written.
    """
    how = find_method(job.method)
    check_job(job, how)
    settings, of_reward = read_settings(job, how)
    how.check(settings, len(job.experts), job.backend)
    find = make_extract(job.extract or getattr(settings, "extract", "auto"))
    rows = read_rows(Path(job.source), job.num, job.shard)
    summary = Summary(held_records(Path(job.out), job.method, job.resume))
    left = missing(rows, summary.records)
    progress = Progress(len(rows), len(rows) - len(left))
    if not left:
        return summary
    tell = on_progress or (lambda _: None)

    good = [row for row in left if not row.problem]
    with (
        opened(job, how, of_reward, good, progress, tell) as run,
        appending(Path(job.out)) as write,
    ):

        def finish(row: Row, result: Result) -> None:
            record = make_record(job.method, row, result, find)
            write(dump(record))
            summary.add(record)
            progress.done += 1
            if on_record is not None:
                on_record(record)
            tell(progress)

        for row in left:
            if row.problem:
                finish(row, failed_result(Prompt(row.id, (), ""), TaskError(row.problem)))
        run(good, settings, finish)
    return summary


def check_job(job: TextJob, how: Method) -> None:
    """Raises DecodeError for what is missing, and for what would do nothing."""
    if how.reward == REQUIRED and job.reward is None:
        raise DecodeError(f"{job.method} chooses by a reward: name one, e.g. --reward math")
    if how.reward == NONE and job.reward is not None:
        raise DecodeError(f"{job.method} has no use for a reward: leave it out")
    if how.models and not (job.small and job.experts and isinstance(job.model, str)):
        raise DecodeError(f"{job.method} needs a small model and at least one expert, by name")
    if not how.models and (job.small or job.experts):
        raise DecodeError(f"{job.method} decodes with one model: leave out small and experts")
    if job.in_flight < 1:
        raise DecodeError(f"in_flight={job.in_flight}: at least 1 search must run")
    if job.dtype not in DTYPES:
        raise DecodeError(f"dtype={job.dtype!r}: choose one of {', '.join(DTYPES)}")
    kind = job.device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        why = "this machine has no usable GPU" if kind == "cuda" else "choose cpu or cuda"
        raise DecodeError(f"device={job.device!r}: {why}")
    if job.reward is None and any(item.startswith(OF_REWARD) for item in job.overrides):
        raise DecodeError("there are options of a reward, but no reward: name one")


def read_settings(job: TextJob, how: Method) -> tuple[SearchConfig, dict[str, Any]]:
    """The method's config, and the parameters of the reward."""
    own = [item for item in job.overrides if not item.startswith(OF_REWARD)]
    of_reward = [
        item.removeprefix(OF_REWARD) for item in job.overrides if item.startswith(OF_REWARD)
    ]
    settings = parse(how.config_class(), job.config if job.config is not None else {}, own)
    if job.extract is not None and hasattr(settings, "extract"):
        settings = dataclasses.replace(settings, **{"extract": job.extract})
    params: Any = OmegaConf.to_container(OmegaConf.from_dotlist(of_reward))
    return settings, params


@contextmanager
def opened(
    job: TextJob,
    how: Method,
    of_reward: dict[str, Any],
    good: Sequence[Row],
    progress: Progress,
    tell: Callable[[Progress], None],
) -> Iterator[Callable[[Sequence[Row], SearchConfig, Finish], None]]:
    """What answers rows, with its models and its reward."""
    method = how.load()
    asked: dict[str, Any] = {"chat": job.chat, "system": job.system}
    if how.models:
        names = (str(job.model), job.small, job.experts)
        kind = {"backend": job.backend, "device": job.device, "dtype": job.dtype}
        with how.open_models(*names, **kind) as fused:

            def fuse(rows: Sequence[Row], settings: SearchConfig, finish: Finish) -> None:
                def done(index: int, result: Result) -> None:
                    progress.tokens += result.num_generated_tokens
                    finish(rows[index], result)

                method(fused, as_prompts(rows), settings, on_done=done, **asked)

            yield fuse
        return

    with ExitStack() as stack:
        reward = None
        if job.reward is not None:
            reward = stack.enter_context(FunctionReward(job.reward, of_reward))
            if prompts := as_prompts(good):
                reward.check(set(prompts[0]) - {"id"})
        engine = job.model
        if isinstance(engine, str):
            opened = open_engine(engine, backend=job.backend, device=job.device, dtype=job.dtype)
            engine = stack.enter_context(opened)
        metered = Metered(engine, progress, tell)

        def search(rows: Sequence[Row], settings: SearchConfig, finish: Finish) -> None:
            prompts = as_prompts(rows)

            def done(index: int, result: Result) -> None:
                finish(rows[index], result)

            asked["in_flight"] = job.in_flight
            method(metered, prompts, reward, settings, on_done=done, **asked)

        yield search


class Metered:
    """`SearchEngine` that counts what another one is asked."""

    def __init__(
        self, engine: SearchEngine, progress: Progress, tell: Callable[[Progress], None]
    ) -> None:
        self.tokenizer, self.eos_ids = engine.tokenizer, engine.eos_ids
        self._engine, self._progress, self._tell = engine, progress, tell

    @property
    def limits(self) -> Limits:
        return self._engine.limits

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """See `SearchEngine`."""
        replies = self._engine.answer(requests)
        self._progress.requests += len(requests)
        self._progress.tokens += sum(len(r.ids) for r in replies if isinstance(r, Drawn))
        self._tell(self._progress)
        return replies


def as_prompts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with their ids and the same columns each, None where a row lacks one: a reward is given
    the columns of the rows that are scored together, which should not depend on who they are."""
    columns = dict.fromkeys(name for row in rows for name in row.value if name not in PROMPT_KEYS)
    if any(row.answer is not None for row in rows):  # whichever of its names it has
        return [{**columns, **row.value, "answer": row.answer, "id": row.id} for row in rows]
    return [{**columns, **row.value, "id": row.id} for row in rows]


def make_record(method: str, row: Row, result: Result, find: Extract) -> Record:
    """A line of the output."""
    record: Record = {**result.to_json(), "id": row.id, "method": method, "prompt": row.prompt}
    if row.answer is not None:
        right = not result.error and is_right(result.text, row.answer, find)
        record |= {"answer": row.answer, "right": right}
    return record


@contextmanager
def appending(path: Path) -> Iterator[Callable[[str], None]]:
    """Writes lines to the end of a file; each is on its way to the disk when it returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise DecodeError(f"{path} cannot be written ({error}): choose another output") from error
    with file:

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()

        yield write
