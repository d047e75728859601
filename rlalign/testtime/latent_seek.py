"""LatentSeek: a search over how a greedy answer begins, steered by a reward.

    z      what the head reads for the first rho * T tokens of the greedy answer
    repeat until the reward is above tau, or max_steps:
        z  <- ascend(z, r * d log pi(a | z) / dz)         a: the tokens that earned r
        a  <- argmax(W z), up to the first end token
        x  <- a and its greedy continuation;  r <- reward(x)

The model never reads z: it only picks the tokens that the answer begins with (Li et al. 2025,
https://arxiv.org/abs/2505.13308). So latents are computed only where the greedy answer is refused,
a step that leaves the tokens as they are costs neither a draw nor a reward, and a prefix that was
seen before is remembered.

compat="official" keeps of the authors' code: prefixes that go on behind an end token, the last
answer in place of the best, bfloat16 latents, and how verdicts are read (verifier_roles.py). Not
kept: decoding without a cache, other stops for the first answer than for the rest, 1025 tokens for
1024, the smoothed logarithm, and grading by string.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlalign.algos.latent import Ascent, LatentState
from rlalign.config.testtime import LatentSeekConfig
from rlalign.rollout.search import Ascend, Ascended, Draw, Latents, Search, SearchEngine
from rlalign.rollout.seeds import latent_seed
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Given, Prompt, plain_text
from rlalign.testtime.result import Result, make_result
from rlalign.testtime.rewards import Reward
from rlalign.testtime.run import IN_FLIGHT, greedy, longest, new_ledger, run_each, settings
from rlalign.testtime.solver_templates import with_template
from rlalign.testtime.verifier_roles import SelfVerification, check_verifier
from rlalign.types import FINISH_LENGTH, FINISH_STOP

WORST = -1.0  # the reward of an answer that has none
COUNTERS = (
    "steps", "repeats", "tie_mismatches", "bad_rewards", "positive_rewards", "cut_off"
)  # fmt: skip


def latent_seek(
    engine: SearchEngine,
    prompts: Sequence[Given],
    reward: Reward | None = None,
    config: LatentSeekConfig | None = None,
    *,
    oracle: bool = False,
    chat: bool | None = None,
    system: str = "",
    in_flight: int = IN_FLIGHT,
    on_done: Callable[[int, Result], None] | None = None,
    **options: Any,
) -> list[Result]:
    """Search for an answer to each prompt whose reward is above `tau`; without a `reward`, the
    model's own (`SelfVerification`, whose errors are raised here). `oracle` marks every result
    (`counters["oracle"]`): say so where the reward knows the label. `options` are those of
    LatentSeekConfig.

    `stop_reason`: "accepted", "max_steps", "no_latents" (the answer is too short for rho), "still"
    (the gradient is zero), or a budget.

    >>> latent_seek(engine, ["Tom has 3 boxes of 12 ..."], rho=0.1)            # doctest: +SKIP
    """
    cfg = settings(LatentSeekConfig, config, options)
    reward = reward or _own_reward(engine, cfg, chat)
    return run_each(
        engine,
        prompts,
        lambda prompt: search(engine, prompt, reward, cfg, oracle=oracle, chat=chat),
        chat=chat,
        system=system,
        in_flight=in_flight,
        on_done=on_done,
    )


def search(
    engine: SearchEngine,
    prompt: Prompt,
    reward: Reward | None,
    cfg: LatentSeekConfig,
    *,
    oracle: bool = False,
    chat: bool | None = None,
) -> Search[Result]:
    """Of one prompt. Budgets are looked at between rounds, and an answer that `max_tokens` cuts
    off is not judged. Counts "steps", "repeats" (steps that changed no token), "tie_mismatches"
    (latents whose likeliest token is not the greedy one: numerics), "bad_rewards" (not finite:
    taken for -1), "positive_rewards" (above 0, not above tau: the answer cannot change by them) and
    "cut_off" answers."""
    ledger = new_ledger(cfg)
    ledger.counters.update(dict.fromkeys(COUNTERS, 0))
    if oracle:
        ledger.counters["oracle"] = 1
    prompt = with_template(engine.tokenizer, prompt, cfg.template, chat)
    seeker = _Seeker(engine, prompt, reward or _own_reward(engine, cfg, chat), cfg, ledger)
    stop_reason = yield from seeker.run()
    chosen = seeker.chosen()
    return make_result(
        prompt,
        ledger,
        text=chosen.text,
        token_ids=chosen.ids,
        finish=chosen.finish,
        stop_reason=stop_reason,
        reward=chosen.told,
        trace=seeker.trace(),
    )


def check(cfg: LatentSeekConfig) -> None:
    """Raises DecodeError for a self-reward that makes no sense."""
    check_verifier(cfg.verifier)


def _own_reward(engine: SearchEngine, cfg: LatentSeekConfig, chat: bool | None) -> Reward:
    options = {"tau": cfg.tau, "compat": cfg.compat, "seed": cfg.seed, "chat": chat}
    return SelfVerification(engine, cfg.verifier, **options)


@dataclass(slots=True)
class _Answer:
    """An answer and its beginning, which the search chose; NaN: not judged. `is_scored` is false
    where the reward is `WORST` for want of one."""

    prefix: tuple[int, ...]
    ids: tuple[int, ...]
    finish: str
    text: str
    reward: float = math.nan
    roles: dict[str, bool | None] = field(default_factory=dict)
    is_scored: bool = True

    @property
    def told(self) -> float | None:
        """The reward as others see it."""
        return self.reward if self.is_scored and not math.isnan(self.reward) else None


@dataclass(frozen=True, slots=True)
class _Visit:
    """An answer at a step; before it, `repeats` steps changed nothing."""

    step: int
    answer: _Answer
    repeats: int = 0


class _Seeker:
    """One search: where it has been, and what it remembers."""

    def __init__(
        self,
        engine: SearchEngine,
        prompt: Prompt,
        reward: Reward,
        cfg: LatentSeekConfig,
        ledger: Ledger,
    ) -> None:
        self._engine, self._prompt, self._reward = engine, prompt, reward
        self._cfg, self._ledger = cfg, ledger
        self._official = cfg.compat == "official"
        self._length = longest(engine, prompt.ids, cfg.max_new_tokens)
        self._known: dict[tuple[int, ...], _Answer] = {}
        self._path: list[_Visit] = []
        self._num_latents = 0
        self._how = Ascent(
            lr=cfg.lr,
            optimizer=cfg.optimizer,
            grad_clip=cfg.grad_clip,
            dtype="bfloat16" if self._official else cfg.dtype,
            proposal=cfg.proposal,
            tokens=cfg.tokens,
        )

    def run(self) -> Search[str]:
        """Fill the path; the reason why it ends."""
        first = yield from self._write(())
        self._path.append(_Visit(0, first))
        over = yield from self._judge(first)
        if over:
            return over
        if first.reward > self._cfg.tau:
            return "accepted"
        if self._cfg.max_steps == 0:
            return "max_steps"
        start, stop = self._span(first)
        if start >= stop:
            return "no_latents"
        self._num_latents = stop - start
        first.prefix = first.ids[:stop]
        if not self._ledger.counters["bad_rewards"]:
            self._known[first.prefix] = first
        if over := self._ledger.over():
            return over
        return (yield from self._climb(first, start, stop))

    def _climb(self, current: _Answer, start: int, stop: int) -> Search[str]:
        cfg, ledger = self._cfg, self._ledger
        kept, tokens_N = current.ids[:start], torch.tensor(current.ids[start:stop])
        state = yield from self._latents(current, start, stop)
        repeats = 0
        for step in range(1, cfg.max_steps + 1):
            if over := ledger.over():
                return over
            seed = latent_seed(cfg.seed, self._prompt.id, step)
            request = Ascend(state, tokens_N, current.reward, self._how, seed)
            [moved] = yield from ledger.ask([request])
            if step == 1:
                ledger.counters["tie_mismatches"] = _differing(moved, tokens_N)
            if moved.is_still:
                return "still"
            ledger.counters["steps"] += 1
            state, tokens_N = moved.state, moved.tokens_N
            prefix = kept + self._up_to_end(tokens_N.tolist())
            same = prefix == current.prefix
            answer, over = yield from self._visit(prefix)
            if over:
                return over
            if same:
                repeats += 1
                ledger.counters["repeats"] += 1
            # Without a memo the same beginning is judged anew, and the verdict may be another one.
            if answer is current or (same and answer.reward == current.reward):
                continue
            current = answer
            self._path.append(_Visit(step, current, repeats))
            repeats = 0
            if current.reward > cfg.tau:
                return "accepted"
        return "max_steps"

    def _latents(self, first: _Answer, start: int, stop: int) -> Search[LatentState]:
        num = len(self._prompt.ids)
        request = Latents(self._prompt.ids + first.ids[:stop], num + start, num + stop)
        [latent_ND] = yield from self._ledger.ask([request])
        return LatentState.start(latent_ND, self._how)

    def _visit(self, prefix: tuple[int, ...]) -> Search[tuple[_Answer, str]]:
        """The answer that begins with `prefix`, judged; or the budget that is used up first."""
        if self._cfg.memo and prefix in self._known:
            return self._known[prefix], ""
        answer = yield from self._write(prefix)
        bad = self._ledger.counters["bad_rewards"]
        over = yield from self._judge(answer)
        if self._ledger.counters["bad_rewards"] == bad:  # a reward that failed may not fail again
            self._known[prefix] = answer
        return answer, over

    def _write(self, prefix: tuple[int, ...]) -> Search[_Answer]:
        left = self._length - len(prefix)
        if not self._official and prefix and prefix[-1] in self._engine.eos_ids:
            ids, finish = prefix, FINISH_STOP
        elif left < 1:
            ids, finish = prefix, FINISH_LENGTH
        else:
            allowed = self._ledger.left(left)
            request = Draw(self._prompt.ids + prefix, greedy(allowed))
            [drawn] = yield from self._ledger.ask([request])
            self._ledger.cuts([drawn], allowed, left)
            ids, finish = prefix + drawn.ids, drawn.finish
        self._ledger.counters["cut_off"] += finish == FINISH_LENGTH
        return _Answer(prefix, ids, finish, plain_text(self._engine.tokenizer, ids))

    def _judge(self, answer: _Answer) -> Search[str]:
        """Give `answer` its reward, unless a budget is used up, whose name is returned."""
        if over := self._ledger.over():
            return over
        if isinstance(self._reward, SelfVerification):
            verdict = yield from self._reward.verify(self._prompt, answer.text, self._ledger)
            if self._ledger.was_cut:
                return self._ledger.over()
            reward, answer.roles = verdict.reward, verdict.roles
        else:
            reward = yield from self._reward(self._prompt, answer.text, self._ledger)
        if not math.isfinite(reward):
            self._ledger.counters["bad_rewards"] += 1
            reward, answer.is_scored = WORST, False
        self._ledger.counters["positive_rewards"] += 0 < reward <= self._cfg.tau
        answer.reward = reward
        return ""

    def _span(self, first: _Answer) -> tuple[int, int]:
        """First token that is optimised, and the one behind the last."""
        # Rounding must not lose a token: 0.29 * 100 is 28.999...
        num = min(int(self._cfg.rho * len(first.ids) + 1e-9), self._cfg.max_latent_len)
        start = self._cfg.start_index
        return start, min(start + num, len(first.ids))

    def _up_to_end(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Up to the first end token, and with it."""
        ends = (i + 1 for i, token in enumerate(tokens) if token in self._engine.eos_ids)
        return tuple(tokens if self._official else tokens[: next(ends, len(tokens))])

    def chosen(self) -> _Answer:
        """The answer to return."""
        answers = [visit.answer for visit in self._path]
        if self._official or self._cfg.select == "last":
            return answers[-1]
        return max(answers, key=lambda answer: answer.reward)

    def trace(self) -> dict[str, Any]:
        """What a page draws: every answer, what changed in its beginning, and who approved."""
        steps, before = [], ()
        for visit in self._path:
            answer = visit.answer
            entry: dict[str, Any] = {
                "step": visit.step,
                "text": answer.text,
                "reward": answer.told,
                "prefix": [self._engine.tokenizer.decode([token]) for token in answer.prefix],
                "changed": _changed(before, answer.prefix) if visit.step else [],
                "roles": answer.roles,
            }
            if visit.repeats:
                entry["repeats"] = visit.repeats
            steps.append(entry)
            before = answer.prefix
        return {"method": "latent_seek", "num_latents": self._num_latents, "steps": steps}


def _differing(moved: Ascended, tokens_N: Tensor) -> int:
    return int((moved.before_N != tokens_N).sum())


def _changed(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """Positions where two beginnings differ; what only one of them has differs."""
    longer, shorter = max(len(before), len(after)), min(len(before), len(after))
    changed = [i for i in range(shorter) if before[i] != after[i]]
    return [*changed, *range(shorter, longer)]
