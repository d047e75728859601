"""Scored completions that are already there, as groups of samples to train on off-policy.

Prompts come from any source of this package (load.py); what their columns say of completions is
read by scored_rows.py and made into tokens here, once:

    tokens = tokenizer(text) + end of sequence        (none after a truncated completion)

just what the policy itself would have drawn after the prompt. Who wrote a completion, and with
which probability, is not needed; `Sample.source_id` counts the writers that the data names.

A transform of the scores must not differ between prompts by more than a shift: the optimum
pi_ref exp(R / beta) / Z of a contrastive objective (arXiv 2406.19185) is that of one function R.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlalign.config.schema import ScoredConfig, TaskConfig
from rlalign.tasks.errors import TaskError
from rlalign.tasks.load import check_report, report_of
from rlalign.tasks.prompt_set import BadRow, PromptSet
from rlalign.tasks.rows import RowProblem
from rlalign.tasks.scored_rows import Completion, ScoredRow, read_scored
from rlalign.tasks.source import LONG_COMPLETION, MALFORMED, TOO_LONG
from rlalign.types import FINISH_LENGTH, FINISH_STOP, Group, Prompt, Sample, Scores

TRANSFORMS = ("none", "standardize", "clip")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoreTransform:
    """(score - shift) / scale, within low .. high: one function for all prompts.

    >>> ScoreTransform(shift=2.0, scale=0.5)(torch.tensor([3.0]))
    tensor([2.])
    """

    shift: float = 0.0
    scale: float = 1.0
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, score_B: torch.Tensor) -> torch.Tensor:
        """float32 [B]; NaN stays NaN."""
        return ((score_B.double() - self.shift) / self.scale).clamp(self.low, self.high).float()


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A prompt's completions. `scores.reward_B` are transformed, `scores.acc_B` as the data has
    them; `ref_logps` are sums over a completion's tokens, None where the data says nothing."""

    group: Group
    scores: Scores
    ref_logps: tuple[float | None, ...]


@dataclass(frozen=True)
class ScoredSet:
    """The prompts that have completions, and each one's group by the prompt's id."""

    prompts: PromptSet
    groups: Mapping[str, ScoredGroup]
    transform: ScoreTransform
    sources: tuple[str, ...]  # `source_id` i is the i-th of them, from 1 on

    def __getitem__(self, prompt_id: str) -> ScoredGroup:
        return self.groups[prompt_id]


def load_scored(
    prompts: PromptSet, cfg: TaskConfig, tokenizer: Any, *, max_completion_length: int
) -> ScoredSet:
    """The completions of `prompts` (read by `load_prompts`), at most `max_completion_length` tokens
    each.

    Raises TaskError for broken rows unless `cfg.on_bad_row` is "skip", where nothing is left, and,
    with `cfg.completions` "dataset", where no prompt has two completions to compare.
    """
    check_transform(cfg.scored)
    rows, bad = _read(prompts, cfg, tokenizer)
    rows = _tokenised(rows, tokenizer)
    reader = _Reader(cfg.scored, max_completion_length)
    kept: list[ScoredRow] = []
    for row in rows:
        try:
            kept.append(dataclasses.replace(row, completions=reader.completions(row)))
        except RowProblem as problem:
            bad[_index(row.prompt)] = _bad_row(row.prompt, problem)
    check_report(report_of(prompts.report.source, len(prompts), bad), cfg)
    kept = [row for row in kept if row.completions]
    _check_groups(kept, len(rows), reader, prompts.report.source, cfg)
    transform = _make_transform([c.score for row in kept for c in row.completions], cfg.scored)
    sources = tuple(sorted({c.source for row in kept for c in row.completions}))
    groups = {row.prompt.id: _group(row, transform, sources, tokenizer) for row in kept}
    ordered = PromptSet(
        [row.prompt for row in kept], prompts.report, seed=prompts.seed, shuffle=prompts.shuffle
    )
    return ScoredSet(ordered, groups, transform, sources)


def check_transform(cfg: ScoredConfig) -> None:
    """Raise TaskError for a `score_transform` that is not one function of all scores."""
    if cfg.score_transform not in TRANSFORMS:
        raise TaskError(
            f"task.scored.score_transform = {cfg.score_transform!r}; allowed: "
            f"{', '.join(TRANSFORMS)}. Per-group standardisation of scores changes the optimum: "
            "use standardize (of the whole data set) or none"
        )
    low, high = _bounds(cfg)
    unset = cfg.score_min is None and cfg.score_max is None
    if cfg.score_transform == "clip" and (unset or not low < high):
        raise TaskError(
            f"task.scored.score_transform=clip, to {low:g} .. {high:g}: set task.scored.score_min, "
            "score_max or both, the lower one first"
        )


def _bounds(cfg: ScoredConfig) -> tuple[float, float]:
    low = -math.inf if cfg.score_min is None else cfg.score_min
    return low, math.inf if cfg.score_max is None else cfg.score_max


def _read(
    prompts: PromptSet, cfg: TaskConfig, tokenizer: Any
) -> tuple[list[ScoredRow], dict[int, BadRow]]:
    """Checked rows, those with one completion and the same prompt together."""
    need_scores = not (cfg.completions == "mixed" and cfg.scored.rescore)
    rows: list[ScoredRow] = []
    single: dict[tuple[int, ...], int] = {}  # prompt: its place among the rows
    bad: dict[int, BadRow] = {}
    for prompt in prompts:
        try:
            row = read_scored(prompt, need_scores=need_scores)
            _check_tokens(row, len(tokenizer), cfg.max_prompt_length)
        except RowProblem as problem:
            bad[_index(prompt)] = _bad_row(prompt, problem)
            continue
        place = single.setdefault(row.prompt.token_ids, len(rows)) if row.single else len(rows)
        if place == len(rows):
            rows.append(row)
        else:
            rows[place] = _joined(rows[place], row)
    return rows, bad


def _joined(row: ScoredRow, more: ScoredRow) -> ScoredRow:
    """Both prompts' columns stay, so that a digest of the prompts covers them."""
    columns = {
        **row.prompt.columns,
        "further": [*row.prompt.columns.get("further", ()), dict(more.prompt.columns)],
    }
    prompt = dataclasses.replace(row.prompt, columns=columns)
    [last] = more.completions
    last = dataclasses.replace(last, index=len(row.completions))
    return dataclasses.replace(row, prompt=prompt, completions=(*row.completions, last))


def _check_tokens(row: ScoredRow, vocabulary: int, max_prompt_length: int) -> None:
    """Of what the data gives as token ids."""
    prompt = row.prompt.token_ids
    if len(prompt) > max_prompt_length:
        raise RowProblem(
            TOO_LONG, f"{len(prompt)} prompt_ids, task.max_prompt_length is {max_prompt_length}"
        )
    for ids in (prompt, *(completion.token_ids or () for completion in row.completions)):
        strange = [token for token in ids if not 0 <= token < vocabulary]
        if strange:
            raise RowProblem(
                MALFORMED,
                f"token id {strange[0]}, and the tokenizer has {vocabulary}: these ids are another "
                "tokenizer's",
            )


def _tokenised(rows: Sequence[ScoredRow], tokenizer: Any) -> list[ScoredRow]:
    """All completions with token ids. A text that spells the end of sequence out gets no second."""
    texts = [c.text for row in rows for c in row.completions if c.token_ids is None]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    end = tokenizer.eos_token_id

    def with_ids(completion: Completion) -> Completion:
        if completion.token_ids is not None:
            return completion
        ids = tuple(next(encoded))
        if not completion.truncated and ids[-1:] != (end,):
            ids = (*ids, end)
        return dataclasses.replace(completion, token_ids=ids)

    return [
        dataclasses.replace(row, completions=tuple(with_ids(c) for c in row.completions))
        for row in rows
    ]


class _Reader:
    """Which completions of a row train; counts the others."""

    def __init__(self, cfg: ScoredConfig, max_length: int) -> None:
        self._cfg, self.max_length = cfg, max_length
        self.left_out: Counter[str] = Counter()

    def completions(self, row: ScoredRow) -> tuple[Completion, ...]:
        """Those that train, equal ones merged. Raises RowProblem."""
        found: dict[tuple[int, ...], list[Completion]] = {}
        for completion in row.completions:
            ids = completion.token_ids or ()
            if not ids:
                raise RowProblem(MALFORMED, f"completion {completion.index} has no tokens")
            if not self._fits(completion, len(ids)):
                continue
            key = ids if self._cfg.dedup else (completion.index,)
            found.setdefault(key, []).append(completion)
        self.left_out["merged"] += sum(len(same) - 1 for same in found.values())
        return tuple(_mean(same) for same in found.values())

    def _fits(self, completion: Completion, length: int) -> bool:
        masked = self._cfg.truncated == "mask"
        if completion.truncated and masked:
            self.left_out["truncated"] += 1
            return False
        if length > self.max_length and not masked:
            raise RowProblem(
                LONG_COMPLETION,
                f"completion {completion.index} has {length} tokens, "
                f"rollout.max_completion_length is {self.max_length}",
            )
        self.left_out["too long"] += length > self.max_length
        return length <= self.max_length


def _mean(same: Sequence[Completion]) -> Completion:
    """The first of equal completions, with the mean of their scores."""
    return dataclasses.replace(same[0], score=sum(c.score for c in same) / len(same))


def _check_groups(
    kept: Sequence[ScoredRow], num_rows: int, reader: _Reader, spec: str, cfg: TaskConfig
) -> None:
    """Warn of what is left out; raise TaskError where nothing can be learned from the rest."""
    told = {
        "merged": "completions equal another one of their prompt and were merged with it, scores "
        "averaged (task.scored.dedup)",
        "truncated": "truncated completions left their groups (task.scored.truncated=mask)",
        "too long": "completions left their groups, being longer than "
        f"rollout.max_completion_length = {reader.max_length}; raise it to train on them",
    }
    for kind, count in reader.left_out.items():
        if count:
            log.warning("%s: %d %s", spec, count, told[kind])
    if len(kept) < num_rows:
        log.warning("%s: %d prompts have no completion left", spec, num_rows - len(kept))
    if not kept:
        raise TaskError(
            f"{spec}: no completion is left: {dict(reader.left_out)}. Raise "
            "rollout.max_completion_length, or set task.scored.truncated=keep"
        )
    single = [row for row in kept if len(row.completions) == 1]
    if cfg.completions != "dataset" or not single:
        return
    if len(single) == len(kept):
        raise TaskError(
            f"{spec}: training on the data's completions needs at least 2 of them per prompt; each "
            f"of the {len(kept)} prompts has 1 (the first: {single[0].prompt.id}). Give more "
            "completions a prompt, or use task.completions=mixed, which adds the policy's own"
        )
    log.warning(
        "%s: %d of %d prompts have only 1 completion, which nothing can be compared with (the "
        "first: %s)", spec, len(single), len(kept), single[0].prompt.id,
    )  # fmt: skip


def _make_transform(scores: Sequence[float], cfg: ScoredConfig) -> ScoreTransform:
    if cfg.score_transform == "clip":
        low, high = _bounds(cfg)
        return ScoreTransform(low=low, high=high)
    if cfg.score_transform == "none":
        return ScoreTransform()
    score_B = torch.tensor(scores, dtype=torch.float64)
    mean, deviation = float(score_B.mean()), float(score_B.std(correction=0))
    if not deviation > 0:
        raise TaskError(
            f"task.scored.score_transform=standardize, and all {len(scores)} scores are {mean:g}: "
            "there is nothing to learn from them, or the column is the wrong one"
        )
    log.info("scores: (score - %g) / %g, over the whole data set", mean, deviation)
    return ScoreTransform(mean, deviation)


def _group(
    row: ScoredRow, transform: ScoreTransform, sources: Sequence[str], tokenizer: Any
) -> ScoredGroup:
    number = {name: i for i, name in enumerate(sources, 1)}
    samples = tuple(
        Sample(
            prompt_id=row.prompt.id,
            index=completion.index,
            token_ids=completion.token_ids or (),
            logp=(0.0,) * len(completion.token_ids or ()),
            finish_reason=FINISH_LENGTH if completion.truncated else FINISH_STOP,
            spans=(),
            text=_shown(completion, tokenizer),
            source_id=number[completion.source],
        )
        for completion in row.completions
    )
    score_B = torch.tensor([c.score for c in row.completions])
    return ScoredGroup(
        Group(row.prompt, samples, row.weight),
        Scores(transform(score_B), score_B),
        tuple(completion.ref_logp for completion in row.completions),
    )


def _shown(completion: Completion, tokenizer: Any) -> str:
    if completion.text is not None:
        return completion.text
    return tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def _index(prompt: Prompt) -> int:
    return int(prompt.id.rpartition("/")[2])


def _bad_row(prompt: Prompt, problem: RowProblem) -> BadRow:
    name = prompt.columns.get("id")
    place = prompt.id if name is None else f"{prompt.id} (id {name!r})"
    return BadRow(place, problem.kind, problem.detail)
