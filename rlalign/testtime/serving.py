"""Test-time methods as models of the rollout server: NAME@latent-seek, NAME@best-of-8.

What a client sends is distrusted: options go through the method's config and its ranges; budgets
may not exceed the server's; what would load a file, run a pattern of the client's or make the
server itself do much is the operator's alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from rlalign.config.load import parse
from rlalign.config.serving import ServeTesttimeConfig
from rlalign.config.testtime import (
    BestOfConfig,
    LatentSeekConfig,
    MajorityConfig,
    RainConfig,
    SearchConfig,
    VerifierConfig,
)
from rlalign.rewards.call import GIVEN
from rlalign.rollout.search import Search, SearchEngine
from rlalign.rollout.server.methods import Asked, Found, Progress, ServedModel
from rlalign.testtime.best_of_n import search as search_best_of_n
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.latent_seek import search as search_latent_seek
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.majority import search as search_majority
from rlalign.testtime.prompt import Prompt, plain_text
from rlalign.testtime.rain import search as search_rain
from rlalign.testtime.rain_run import check
from rlalign.testtime.result import Result
from rlalign.testtime.rewards import FunctionReward, Reward
from rlalign.testtime.self_evaluation import self_judge
from rlalign.testtime.verifier_roles import ROLES, SelfVerification, Verdict, check_verifier

SELF = "self"  # the reward by which the model judges itself
NUMBER = re.compile(r"(.+)-([1-9][0-9]{0,4})")  # of a method's name: best-of-8
OPERATORS = ("embedder", "format_pattern")  # options that name files, or patterns that may hang
LARGE = ("seed", "max_tokens", "max_new_tokens")  # whole numbers that are bounded elsewhere
MAX_NUMBER = 65_536  # of the others: what a method makes a list of must fit into memory
MAX_SAMPLES = 1024  # of a method that ends in a number
NEUTRAL = {"temperature": 0, "top_p": 1, "top_k": 0}  # of a method that samples nothing
ACCOUNT = (
    "stop_reason", "reward", "num_generated_tokens", "num_prefill_tokens", "num_engine_calls",
    "num_reward_calls", "wall_s", "counters",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What a search begins with. `reward` is the one that was asked for, if any; `judges` says
    that the model judges itself."""

    engine: SearchEngine
    prompt: Prompt
    reward: Reward | None
    judges: bool
    cfg: Any
    progress: Progress


@dataclass(frozen=True)
class Served:
    """A method. `number` is the option that ends its name, `most` the tokens that it may cost at
    most (None: nobody knows), given whether the model judges itself; it does with `judges`, unless
    a reward is asked for."""

    config: type[SearchConfig]
    search: Callable[[Start], Search[Result]]
    number: str = ""
    most: Callable[[Any, bool], int | None] = lambda cfg, judges: None
    judges: bool = True


def _best_of_n(start: Start) -> Search[Result]:
    reward = start.reward or _verification(start, VerifierConfig())
    return search_best_of_n(start.engine, start.prompt, reward, start.cfg)


def _majority(start: Start) -> Search[Result]:
    reward, cfg = start.reward, start.cfg
    if start.judges:  # verdicts are from -1 to 0: as they are they would count nothing
        reward, cfg = _verification(start, VerifierConfig()), dataclasses.replace(cfg, weight="exp")
    return search_majority(start.engine, start.prompt, reward, cfg)


def _latent_seek(start: Start) -> Search[Result]:
    cfg = start.cfg
    check_verifier(cfg.verifier)
    reward = start.reward or _verification(start, cfg.verifier, tau=cfg.tau, compat=cfg.compat)
    return search_latent_seek(start.engine, start.prompt, reward, cfg)


def _rain(start: Start) -> Search[Result]:
    check(start.cfg)
    scorer = start.reward
    if scorer is None:
        scorer = Watched(self_judge(start.engine, start.cfg), start.progress)
    return search_rain(start.engine, start.prompt, scorer, start.cfg)


def _of_samples(cfg: BestOfConfig, judges: bool) -> int:
    each = cfg.max_new_tokens + (len(ROLES) * VerifierConfig().max_new_tokens if judges else 0)
    return cfg.num_samples * each


METHODS: Mapping[str, Served] = {
    "best-of": Served(BestOfConfig, _best_of_n, "num_samples", _of_samples),
    "majority": Served(MajorityConfig, _majority, "num_samples", _of_samples, judges=False),
    "latent-seek": Served(LatentSeekConfig, _latent_seek),
    "rain": Served(RainConfig, _rain),
}
EXAMPLE = 8  # of the number in a name


class ServedMethods:
    """The server's `Methods`. The rewards of `config` are started at once; close it in the end.

    Raises RewardError for one that cannot be found or started, DecodeError for names that do not
    tell them apart.
    """

    def __init__(self, config: ServeTesttimeConfig) -> None:
        self._config = config
        names = [SELF, *(reward.name for reward in config.rewards)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DecodeError(f"testtime.rewards: {twice!r} is the name of two; {SELF!r} is taken")
        self._rewards: dict[str, FunctionReward] = {}
        with contextlib.ExitStack() as stack:
            for reward in config.rewards:
                function = FunctionReward(
                    reward.function or reward.name, reward.params, timeout_s=reward.timeout_s
                )
                self._rewards[reward.name] = stack.enter_context(function)
            self._open = stack.pop_all()

    def names(self) -> list[str]:
        """See `Methods`."""
        return [f"{name}-{EXAMPLE}" if m.number else name for name, m in METHODS.items()]

    def knows(self, name: str) -> bool:
        """See `Methods`."""
        return _find(name) is not None

    def begin(
        self, name: str, model: ServedModel, asked: Asked, progress: Progress
    ) -> Search[Found]:
        """See `Methods`. Besides those of the method's config, `asked.options` may be "reward", the
        name of one of the server's or "self", and "columns", what it needs beside the answer.
        Raises DecodeError and ConfigError for options that are wrong."""
        found = _find(name)
        if found is None:
            raise DecodeError(f"there is no method {name!r}; choose one of {self.names()}")
        method, numbers = found
        options = {key: v for key, v in asked.options.items() if key not in ("reward", "columns")}
        for key, value in numbers.items():
            if options.get(key, value) != value:
                raise DecodeError(f"{key}={options[key]!r} with {name}: leave it out")
        _check_options(options)
        _leave_out_sampling(options, method, name)
        cfg = parse(method.config, {**options, **numbers})
        reward, judges = self._reward(method, asked.options.get("reward"), progress)
        if numbers and max(numbers.values()) > MAX_SAMPLES:
            raise DecodeError(f"{name}: a request may ask for {MAX_SAMPLES} samples at most")
        cfg = self._bounded(cfg, method.most(cfg, judges))
        columns = _columns(asked.options.get("columns"))
        text = plain_text(model.tokenizer, asked.ids) if asked.text is None else asked.text
        prompt = Prompt(asked.id, asked.ids, text, columns)
        # It has no `answer`: the server answers what the search yields.
        engine = cast(SearchEngine, model)
        return _told(method.search(Start(engine, prompt, reward, judges, cfg, progress)))

    def close(self) -> None:
        self._open.close()

    def _reward(self, method: Served, name: Any, progress: Progress) -> tuple[Reward | None, bool]:
        """The reward that was asked for, and whether the model judges itself."""
        if name is None or name == SELF:
            return None, method.judges or name == SELF
        if not isinstance(name, str) or name not in self._rewards:
            known = ", ".join([SELF, *self._rewards])
            raise DecodeError(
                f"reward={name!r}: this server has {known}; others are named when it is started "
                "(testtime.rewards)"
            )
        return Watched(self._rewards[name], progress), False

    def _bounded(self, cfg: SearchConfig, most: int | None) -> SearchConfig:
        """`cfg` with the server's budgets where the client gave none. What stays below them anyway
        has none: its samples are drawn side by side."""
        caps = {
            "max_tokens": self._config.max_search_tokens, "max_wall_s": self._config.max_search_s,
        }  # fmt: skip
        for (name, cap), option in zip(
            caps.items(), ("max_search_tokens", "max_search_s"), strict=True
        ):
            if getattr(cfg, name) > cap:
                raise DecodeError(
                    f"{name}={getattr(cfg, name)}: this server gives {cap} at most "
                    f"(testtime.{option})"
                )
        if most is not None and most <= self._config.max_search_tokens:
            return cfg
        unset = {name: cap for name, cap in caps.items() if not getattr(cfg, name)}
        return dataclasses.replace(cfg, **unset)


class Watched:
    """`Reward` that also tells `progress`."""

    def __init__(self, reward: Reward, progress: Progress) -> None:
        self._reward, self._progress = reward, progress

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[float]:
        score = yield from self._reward(prompt, response, ledger)
        self._progress.scored(score)
        return score


class WatchedVerification(SelfVerification):
    """The same of the model's own verdicts."""

    def __init__(self, progress: Progress, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._progress = progress

    def verify(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[Verdict]:
        verdict = yield from super().verify(prompt, response, ledger)
        self._progress.scored(verdict.reward)
        return verdict


def _verification(start: Start, config: VerifierConfig, **options: Any) -> SelfVerification:
    return WatchedVerification(start.progress, start.engine, config, seed=start.cfg.seed, **options)


def _find(name: str) -> tuple[Served, dict[str, int]] | None:
    """A method with the option that its name holds."""
    method = METHODS.get(name)
    if method is not None and not method.number:
        return method, {}
    numbered = NUMBER.fullmatch(name)
    method = METHODS.get(numbered[1]) if numbered else None
    if method is None or numbered is None or not method.number:
        return None
    return method, {method.number: int(numbered[2])}


def _told(search: Search[Result]) -> Search[Found]:
    result = yield from search
    record = result.to_json()
    return Found(
        text=result.text,
        num_tokens=len(result.token_ids),
        finish=result.stop_reason if result.over_budget else result.finish,
        num_generated_tokens=result.num_generated_tokens,
        account={name: record[name] for name in ACCOUNT},
    )


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise DecodeError for what no client may say."""
    for name, value in _leaves(options):
        if name in OPERATORS:
            raise DecodeError(f"{name} cannot be set by a request")
        if isinstance(value, str) and ("${" in value or value.startswith("pattern:")):
            raise DecodeError(f"{name}={value!r}: not from a request")  # nor is it looked up
        if isinstance(value, float) and not math.isfinite(value):
            raise DecodeError(f"{name}={value}: give a finite number")
        if isinstance(value, int) and abs(value) > MAX_NUMBER and name not in LARGE:
            raise DecodeError(f"{name}={value}: a request may say {MAX_NUMBER} at most")


def _leave_out_sampling(options: dict[str, Any], method: Served, name: str) -> None:
    """Forget OpenAI's fields that say what is the case anyway, for a method without such options;
    raise DecodeError for those that do not."""
    has = {field.name for field in dataclasses.fields(method.config)}
    for field, neutral in NEUTRAL.items():
        if field in options.keys() - has and options.pop(field) != neutral:
            raise DecodeError(f"{field}: {name} does not sample its answer; leave it out")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value


def _columns(given: Any) -> dict[str, Any]:
    """What a reward gets beside the answer. Raises DecodeError for names that are none."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise DecodeError(f"columns={given!r}: give a mapping, such as {{'answer': '61'}}")
    strange = [name for name in given if not str(name).isidentifier() or name in GIVEN]
    if strange:
        raise DecodeError(f"columns: {strange[0]!r} is no name of a column")
    return dict(given)
