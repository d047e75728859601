"""From groups of samples to rewards: run every function, combine, count what failed.

    reward = sum_f weight_f * value_f  (+ overlong penalty)

over the functions that apply to a sample (or, under `normalize_then_sum`, of values normalised
within the group first). A sample with a failed verdict, or to which no function applies, gets NaN:
masked, never 0. Legend: B samples, in the order of the groups.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from rlalign import algos
from rlalign.config.schema import AlgoConfig, RewardsConfig
from rlalign.rewards.call import Call, Takes
from rlalign.rewards.inprocess import GRACE_S
from rlalign.rewards.registry import Runner, is_correctness, make_runners
from rlalign.rewards.verdict import RewardError, Verdict
from rlalign.rewards.worker import START_TIMEOUT_S
from rlalign.types import Group, Prompt, Sample, Scores

logger = logging.getLogger(__name__)


def build_scorer(
    cfg: RewardsConfig,
    algo: AlgoConfig,
    max_completion_length: int,
    *,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    images: bool = False,
) -> Scorer:
    """Start every reward of `cfg`. `functions` are Python callables that specs refer to by name;
    `images`: what is scored are images, so every function runs in this process.

    Raises RewardError when one cannot be found, built or started; nothing is left running then.
    """
    runners = make_runners(cfg, functions, images=images)
    return Scorer(cfg, algo, max_completion_length, runners)


class Scorer:
    """Scores groups until closed; a context manager.

    >>> with build_scorer(config.rewards, config.algo, 256) as scorer:
    ...     scores = scorer.score(groups)
    """

    def __init__(
        self,
        cfg: RewardsConfig,
        algo: AlgoConfig,
        max_completion_length: int,
        runners: Sequence[Runner],
    ) -> None:
        self._cfg = cfg
        self._algo = algo
        self._max_len = max_completion_length
        self._runners = runners
        self._accuracy = accuracy_index(cfg)
        self._closed = False
        self._threads = ThreadPoolExecutor(max(1, len(runners)), "rewards")
        try:
            self._takes = list(self._threads.map(lambda runner: runner.start(), runners))
        except BaseException:
            self.close()
            raise

    def score(self, groups: Sequence[Group]) -> Scores:
        """Rewards of all samples, in order. Raises RewardError when more than `max_error_rate` of a
        function's verdicts failed, or a column it needs is not there."""
        sizes = torch.tensor([len(group.samples) for group in groups], dtype=torch.long)
        group_id_B = torch.repeat_interleave(torch.arange(len(groups)), sizes)
        return self._score(call_of(groups), group_id_B, self._overlong(groups))

    def score_images(
        self, prompts: Sequence[Prompt], image_BCHW: torch.Tensor, group_id_B: torch.Tensor
    ) -> Scores:
        """Rewards of images in [0, 1], each with its prompt; images with one group id are compared
        with each other. A function gets the images as a list of [C, H, W] tensors in place of
        completions. Raises RewardError as `score` does."""
        call = _call(prompts, list(image_BCHW), [[]] * len(prompts))
        return self._score(call, group_id_B, torch.zeros(len(prompts)))

    def _score(self, call: Call, group_id_B: torch.Tensor, penalty_B: torch.Tensor) -> Scores:
        if self._closed:
            raise RewardError("this scorer is closed; build another")
        if not self._runners:
            raise RewardError("this scorer was built without a reward function; build another")
        if not len(call):
            return Scores(torch.zeros(0), torch.zeros(0))
        verdicts = self._verdicts(call)
        errors = Counter(v.kind.value for column in verdicts.values() for v in column if v.failed)
        if errors:
            self._report(verdicts, call)
        by_function = {name: values_of(column) for name, column in verdicts.items()}
        rows = zip(*verdicts.values(), strict=True)
        failed_B = torch.tensor([any(verdict.failed for verdict in row) for row in rows])
        weights = [spec.weight for spec in self._cfg.functions]
        raw_B = weighted_sum(list(by_function.values()), weights)
        if self._accuracy is None:
            acc_B = raw_B.masked_fill(failed_B, math.nan)
        else:
            acc_B = list(by_function.values())[self._accuracy].clone()
        combined_B = raw_B
        if self._cfg.aggregation == "normalize_then_sum":
            combined_B = algos.normalize_then_sum(by_function, weights, group_id_B)
        reward_B = (combined_B + penalty_B).masked_fill(failed_B, math.nan)
        return Scores(reward_B, acc_B, by_function, dict(errors))

    def _verdicts(self, call: Call) -> dict[str, list[Verdict]]:
        """What every function says, all at the same time."""
        for runner, takes in zip(self._runners, self._takes, strict=True):
            check_columns(runner.name, takes, list(call.columns))
        timeout_s = self._cfg.timeout_s
        futures = [self._threads.submit(r.score, call, timeout_s) for r in self._runners]
        return {
            runner.name: self._collect(runner.name, future)
            for runner, future in zip(self._runners, futures, strict=True)
        }

    def close(self) -> None:
        """Stop every worker; idempotent."""
        self._closed = True
        for runner in self._runners:
            runner.close()
        self._threads.shutdown()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self, name: str, future: Future[list[Verdict]]) -> list[Verdict]:
        """A runner keeps its deadline itself; this one only names a runner that does not."""
        limit_s = self._cfg.timeout_s + START_TIMEOUT_S + 2 * GRACE_S
        try:
            return future.result(limit_s)
        except TimeoutError as error:
            raise RewardError(f"reward {name!r} gave no verdicts for {limit_s:g} s") from error

    def _overlong(self, groups: Sequence[Group]) -> torch.Tensor:
        length_B = torch.tensor([len(s.token_ids) for group in groups for s in group.samples])
        algo = self._algo
        return algos.overlong_penalty(
            length_B, self._max_len, algo.overlong.buffer_len, algo.overlong.penalty_factor
        )

    def _report(self, verdicts: Mapping[str, list[Verdict]], call: Call) -> None:
        """Log each function's failures; RewardError where they are too many."""
        for name, column in verdicts.items():
            failures = [(i, verdict) for i, verdict in enumerate(column) if verdict.failed]
            if not failures:
                continue
            counts = Counter(verdict.kind.value for _, verdict in failures)
            row, example = failures[0]
            kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
            message = (
                f"reward {name!r}: {len(failures)} of {len(column)} verdicts failed ({kinds}); "
                f"for example prompt {call.prompt_ids[row]!r}: {example.kind}: {example.detail}"
            )
            if len(failures) > self._cfg.max_error_rate * len(column):
                raise RewardError(
                    f"{message}\nThat is more than rewards.max_error_rate = "
                    f"{self._cfg.max_error_rate:g}. Fix the function (or its service), or raise "
                    "rewards.timeout_s if it is only slow, or rewards.max_error_rate to go on with "
                    "those samples masked"
                )
            logger.warning("%s", message)


def call_of(groups: Sequence[Group]) -> Call:
    """The samples of all groups as equal-length lists. A column that a prompt lacks is None there;
    completions of chat prompts are messages."""
    pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
    return _call(
        [prompt for prompt, _ in pairs],
        [_completion(prompt, sample) for prompt, sample in pairs],
        [list(sample.token_ids) for _, sample in pairs],
    )


def _call(prompts: Sequence[Prompt], completions: list[Any], ids: list[list[int]]) -> Call:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    if any(prompt.answer is not None for prompt in prompts):
        columns["answer"] = [prompt.answer for prompt in prompts]
    return Call(
        prompts=[prompt.source for prompt in prompts],
        completions=completions,
        completion_ids=ids,
        columns=columns,
        prompt_ids=[prompt.id for prompt in prompts],
    )


def values_of(column: Sequence[Verdict]) -> torch.Tensor:
    """Verdicts as float32 [B]; NaN: does not apply, or failed."""
    return torch.tensor([math.nan if v.value is None else v.value for v in column])


def weighted_sum(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """[B] sum of weight * value over the values that are there; NaN where none is."""
    values_FB = torch.stack(list(values))
    weight_F1 = torch.tensor(weights)[:, None]
    total_B = (weight_F1 * values_FB.nan_to_num(0.0)).sum(0)
    return total_B.masked_fill(values_FB.isnan().all(0), math.nan)


def check_columns(name: str, takes: Takes, columns: Sequence[str]) -> None:
    """RewardError when the data lacks a column that the function requires."""
    missing = takes.missing_from(columns)
    if missing:
        present = ", ".join(sorted(columns)) or "none besides the prompt"
        raise RewardError(
            f"reward {name!r} requires {', '.join(map(repr, missing))}, which the data does not "
            f"have (columns: {present}). Rename the column, or give the parameter a default"
        )


def _completion(prompt: Prompt, sample: Sample) -> Any:
    if isinstance(prompt.source, str):
        return sample.text
    return [{"role": "assistant", "content": sample.text}]


def accuracy_index(cfg: RewardsConfig) -> int | None:
    """The function whose value is the correctness: the marked one, else the only one, else the only
    built-in correctness; None: the unshaped sum."""
    marked = [i for i, spec in enumerate(cfg.functions) if spec.accuracy]
    if len(marked) > 1:
        names = ", ".join(cfg.functions[i].name for i in marked)
        raise RewardError(f"rewards marked accuracy: true: {names}; mark one at most")
    known = [i for i, spec in enumerate(cfg.functions) if is_correctness(spec)]
    if not marked and len(cfg.functions) == 1:
        return 0
    candidates = marked or known
    return candidates[0] if len(candidates) == 1 else None
