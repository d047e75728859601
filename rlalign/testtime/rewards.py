"""Who says how good a response is: a function, any reward of rlalign, or the model itself.

A `Reward` is a search of its own, so that one which asks the model (LatentSeek's verifiers) shares
the engine's batches with everything else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from rlalign.config.schema import RewardsConfig, RewardSpec
from rlalign.rewards.call import ANSWER_ALIASES, Call
from rlalign.rewards.registry import make_runners
from rlalign.rewards.scorer import check_columns
from rlalign.rewards.verdict import RewardError, Verdict
from rlalign.rollout.search import Rate, Search
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt

TIMEOUT_S = 60.0  # of one call


class Reward(Protocol):
    def __call__(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[float]:
        """The score of a response; NaN where there is none. Higher is better. Texts that were
        scored are counted in the ledger."""
        ...


class Failure(float):
    """NaN in place of a score, and what went wrong."""

    detail: str

    def __new__(cls, detail: str) -> Failure:
        failure = super().__new__(cls, math.nan)
        failure.detail = detail
        return failure


class FunctionReward:
    """`Reward`, and the `Rater` behind it, of a reward function `f(prompts, completions, **columns)
    -> list[float | None]`, or of a reward by name: built in (`math`, `regex`, `reward_model`, ...)
    or `package.module:function`. `params` are its own; the columns are those of the prompts' rows.

    Close it in the end, or use it as a context manager: a named reward may run in processes.
    Raises RewardError for a reward that cannot be found or started, or that needs a column which a
    prompt does not have.

    >>> with FunctionReward("math") as reward: ...                             # doctest: +SKIP
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        params: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        name = function if isinstance(function, str) else getattr(function, "__name__", "reward")
        given = {} if isinstance(function, str) else {name: function}
        config = RewardsConfig(
            functions=[RewardSpec(name=name, params=dict(params or {}))], timeout_s=timeout_s
        )
        self._timeout_s = timeout_s
        [self._runner] = make_runners(config, given)
        self._takes = self._runner.start()
        if "completion_ids" in self._takes.required:
            self.close()
            raise RewardError(
                f"reward {name!r} reads completion_ids, and test-time methods score texts: count "
                "in the text, or leave the parameter out"
            )

    @property
    def reads_answers(self) -> bool:
        """Whether the function asks for the `answer` column: its scores know the label."""
        return bool(self._takes.named & {*ANSWER_ALIASES})

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[float]:
        if self.reads_answers:
            ledger.counters["oracle"] = 1  # its figures know the label
        [score] = yield from ledger.ask([Rate(self, prompt, response)])
        if isinstance(score, Failure):
            ledger.note_failed_reward(score.detail)
        return score

    def rate(self, items: Sequence[tuple[Prompt, str]]) -> list[float | RewardError]:
        """See `Rater`. What failed is a `Failure`; a prompt without a column that the function
        needs has an error, and the others their scores."""
        replies = [self._problem(prompt) for prompt, _ in items]
        good = [item for item, reply in zip(items, replies, strict=True) if reply is None]
        scores = iter(self._score(good) if good else ())
        return [next(scores) if reply is None else reply for reply in replies]

    def _problem(self, prompt: Prompt) -> RewardError | None:
        try:
            self.check(prompt.row)
        except RewardError as error:
            return error
        return None

    def _score(self, items: Sequence[tuple[Prompt, str]]) -> list[float]:
        columns = dict.fromkeys(name for prompt, _ in items for name in prompt.row)
        call = Call(
            prompts=[prompt.text for prompt, _ in items],
            completions=[response for _, response in items],
            completion_ids=[[] for _ in items],
            columns={name: [prompt.row.get(name) for prompt, _ in items] for name in columns},
            prompt_ids=[prompt.id for prompt, _ in items],
        )
        return [_value(verdict) for verdict in self._runner.score(call, self._timeout_s)]

    def check(self, columns: Iterable[str]) -> None:
        """Raises RewardError unless what the function needs is among the columns."""
        check_columns(self._runner.name, self._takes, list(columns))

    def close(self) -> None:
        self._runner.close()

    def __enter__(self) -> FunctionReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_reward(reward: Any) -> Any:
    """`reward`, if it can be one. Raises DecodeError for None, a name or a plain function."""
    if reward is None:
        raise DecodeError("best-of-n chooses by a reward: give one, e.g. FunctionReward('math')")
    plain = callable(reward) and "completions" in inspect.signature(reward).parameters
    if plain or not callable(reward):
        shown = repr(reward) if isinstance(reward, str) else getattr(reward, "__name__", "it")
        raise DecodeError(f"a reward is an object: wrap it, FunctionReward({shown})")
    return reward


def _value(verdict: Verdict) -> float:
    if verdict.failed:
        return Failure(f"{verdict.kind}: {verdict.detail}")
    return math.nan if verdict.value is None else verdict.value
