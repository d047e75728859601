"""Any data set to a PromptSet: find the source, check its rows, tokenise the prompts.

A source is named as in a config: `data/train.jsonl`, `train.parquet`, a folder written by
`save_to_disk`, a hub id `owner/name`, `reasoning_gym:<task>`, `verifiers:<environment>`,
`mini:<task>`. Each has one small module here; docs/data.md shows one example of each.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rlalign.config.schema import TaskConfig
from rlalign.hub import is_hub_id
from rlalign.tasks.errors import TaskError
from rlalign.tasks.hf_datasets import open_folder, open_hub
from rlalign.tasks.jsonl import open_jsonl
from rlalign.tasks.mini import open_mini
from rlalign.tasks.parquet import open_parquet
from rlalign.tasks.prompt_set import BadRow, LoadReport, PromptSet
from rlalign.tasks.reasoning_gym import open_task
from rlalign.tasks.rows import Row, RowProblem, read_row
from rlalign.tasks.source import (
    EMPTY_PROMPT,
    LENGTHS_DIFFER,
    LONG_COMPLETION,
    MISSING_COMPLETIONS,
    MISSING_PROMPT,
    NOT_FINITE,
    TOO_LONG,
    Source,
)
from rlalign.tasks.tokenize import make_encoder
from rlalign.tasks.verifiers import open_environment
from rlalign.types import Prompt

Open = Callable[[str, Mapping[str, Any], str], Source]

GENERATED: dict[str, Open] = {
    "mini": open_mini,
    "reasoning_gym": open_task,
    "verifiers": open_environment,
}
FILES: dict[str, Open] = {".jsonl": open_jsonl, ".ndjson": open_jsonl, ".parquet": open_parquet}
FORMS = "*.jsonl, *.parquet, a folder written by save_to_disk, a hub id (owner/name), " + ", ".join(
    f"{scheme}:<name>" for scheme in GENERATED
)
NOT_INHERITED = ("split", "seed")  # held-out data that shared them would be the training data
NUM_EXAMPLES = 5  # broken rows shown in a message

log = logging.getLogger(__name__)


def load_prompts(cfg: TaskConfig, tokenizer: Any, *, split: str, seed: int = 0) -> PromptSet:
    """The prompts of `cfg.train` (split "train") or `cfg.eval` (split "eval"), tokenised.

    `seed` keys the order in which training takes them. Ids are `<source>/<row>`, rows counted from
    0 over the whole source, so skipping a broken row renames no other.
    Raises TaskError, within seconds, for a source that cannot be read, for broken rows unless
    `cfg.on_bad_row` is "skip", and where no usable row is left.
    """
    spec = cfg.train if split == "train" else cfg.eval
    if spec is None:
        raise TaskError(
            "task.eval is not set: name held-out data, in any of the forms of task.train"
        )
    params = dict(cfg.params) if split == "train" else _eval_params(cfg, spec)
    renamed = _check_columns(params.pop("columns", {}))
    source = open_source(spec, params, split)
    prompts, report = _read(source, spec, renamed, cfg, tokenizer)
    check_report(report, cfg)
    return PromptSet(prompts, report, seed=seed, shuffle=cfg.shuffle)


def open_source(spec: str, params: Mapping[str, Any], split: str) -> Source:
    """Find the reader of a source by the form of its name. Raises TaskError."""
    scheme, colon, name = spec.partition(":")
    if colon and scheme in GENERATED:
        return GENERATED[scheme](name, params, split)
    params = dict(params)
    size = params.pop("size", None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise TaskError(f"the parameter size of {spec} is {size!r}; it is a number of rows, >= 1")
    source = _reader(spec)(spec, params, split)
    return Source(source.label, islice(source.rows, size))


def _reader(spec: str) -> Open:
    path = Path(spec).expanduser()
    if path.is_dir():
        return open_folder
    if path.is_file():
        if path.suffix not in FILES:
            raise TaskError(
                f"{spec}: files are read by their ending, and {path.suffix!r} is none of "
                f"{', '.join(FILES)}"
            )
        return FILES[path.suffix]
    if path.suffix not in FILES and is_hub_id(spec):
        return open_hub
    raise TaskError(f"there is no data at {spec!r}{_neighbours(path)}. Accepted: {FORMS}")


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (no folder {path.parent})"
    near = sorted(p.name for p in path.parent.iterdir() if p.suffix in FILES)
    return f" (in that folder: {', '.join(near[:8])})" if near else ""


def _eval_params(cfg: TaskConfig, spec: str) -> dict[str, Any]:
    if _kind(spec) != _kind(cfg.train):
        return dict(cfg.eval_params)
    inherited = {key: value for key, value in cfg.params.items() if key not in NOT_INHERITED}
    return inherited | dict(cfg.eval_params)


def _kind(spec: str) -> str:
    scheme, colon, _ = spec.partition(":")
    return scheme if colon and scheme in GENERATED else Path(spec).suffix


def _check_columns(renamed: Any) -> Mapping[str, str]:
    if not isinstance(renamed, Mapping) or not all(isinstance(v, str) for v in renamed.values()):
        raise TaskError(
            f"task.params.columns is {renamed!r}; it maps our names to the data's, "
            "e.g. {prompt: question, answer: final_answer}"
        )
    return renamed


def _read(
    source: Source, spec: str, renamed: Mapping[str, str], cfg: TaskConfig, tokenizer: Any
) -> tuple[list[Prompt], LoadReport]:
    encoder = make_encoder(cfg, tokenizer)
    bad: dict[int, BadRow] = {}
    rows: list[Row] = []
    texts: list[str] = []
    num_rows = 0
    for raw in source.rows:
        num_rows += 1
        try:
            row = read_row(raw, renamed)
            texts.append(encoder.render(row.prompt))
            rows.append(row)
        except RowProblem as problem:
            bad[raw.index] = BadRow(raw.place, problem.kind, problem.detail)
    prompts: list[Prompt] = []
    for row, ids in zip(rows, encoder.encode(texts), strict=True):
        if 0 < len(ids) <= cfg.max_prompt_length:
            name = f"{source.label}/{row.index}"
            prompts.append(Prompt(name, ids, row.prompt, row.answer, row.columns))
        elif ids:
            detail = f"{len(ids)} tokens, task.max_prompt_length is {cfg.max_prompt_length}"
            bad[row.index] = BadRow(row.place, TOO_LONG, detail)
        else:
            bad[row.index] = BadRow(row.place, EMPTY_PROMPT, "no tokens")
    return prompts, report_of(spec, num_rows, bad)


def report_of(spec: str, num_rows: int, bad: Mapping[int, BadRow]) -> LoadReport:
    """`bad` by the index of the row."""
    counts = Counter(row.kind for row in bad.values())
    examples = tuple(bad[index] for index in sorted(bad)[:NUM_EXAMPLES])
    return LoadReport(spec, num_rows, dict(counts), examples)


def check_report(report: LoadReport, cfg: TaskConfig) -> None:
    """Raise TaskError for broken rows unless they may be skipped, and where no row is left."""
    if not report.num_rows:
        raise TaskError(f"{report.source} has no rows: nothing to train or evaluate on")
    if report.num_bad and cfg.on_bad_row == "error":
        raise TaskError(
            f"{report}. To mend it: {_remedy(report.bad)}, or drop the broken rows with "
            "task.on_bad_row=skip"
        )
    if report.num_bad == report.num_rows:
        raise TaskError(f"{report}. No row is left. To mend it: {_remedy(report.bad)}")
    if report.num_bad:
        log.warning("%s", report)


def _remedy(kinds: Iterable[str]) -> str:
    remedies = {
        MISSING_PROMPT: "name the prompt's column, e.g. task.params.columns.prompt=question",
        TOO_LONG: "raise task.max_prompt_length",
        MISSING_COMPLETIONS: "give completions and scores (or chosen and rejected; y1, y2, r1, r2; "
        "completion and score), or name the columns, e.g. task.params.columns.scores=ratings",
        LENGTHS_DIFFER: "give one entry a completion",
        NOT_FINITE: "drop the completions that have no number",
        LONG_COMPLETION: "raise rollout.max_completion_length, or leave them out with "
        "task.scored.truncated=mask",
    }
    found = [remedies[kind] for kind in kinds if kind in remedies]
    return "; ".join(found) or "correct the rows"
