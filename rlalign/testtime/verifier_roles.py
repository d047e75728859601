"""LatentSeek's self-reward: the model itself checks an answer, in four roles.

    reward = -(weights of what disapproves) / (all weights), in [-1, 0]

What can disapprove is a role, and the format rule if it has a weight (Li et al. 2025,
https://arxiv.org/abs/2505.13308, in prompts of our own). All roles' questions begin with the same
problem and solution, so an engine with a prefix cache reads those once.

compat="official" reads verdicts as the authors' code does, from question and reply together: a
reply without one is judged by the last phrase of the instructions, which approves for
calculation_check, and for the others when the reply says "true" anywhere; and leaves the format
rule's weight out of the denominator, so that the reward may fall below -1. Two of its quirks are
left out: end-of-turn tokens of the solution inside the question, and a second BOS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rlalign.config.testtime import VerifierConfig
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Choose, Draw, Request, Search, SearchEngine
from rlalign.rollout.seeds import sample_seed
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt, encode_user_turn, plain_text

PHRASE = "FINAL VERDICT:"
HEAD = (
    "You check solutions of mathematical problems. Trust nothing that you have not checked.\n\n"
    "PROBLEM\n{question}\n\nPROPOSED SOLUTION\n{solution}\n\n"
)
GAP = "\n[...]\n"  # where the middle of a long solution was
REPLY_SHARE = 4  # a question leaves a role at most this part of the context, if it needs it


@dataclass(frozen=True, slots=True)
class Role:
    """One of the checks: what is asked after HEAD, and how the reply is to end."""

    name: str
    task: str
    end: str


ROLES = (
    Role(
        "calculation_check",
        "YOUR TASK: the arithmetic, and nothing else. Go through the solution and write down every "
        "place where it computes something, with the result that it states. Work each one out "
        "again and compare. A number that stands alone, with no computation, needs no check.",
        f'End with the line "{PHRASE} False" if any result is wrong, and with "{PHRASE} True" if '
        "all are right.",
    ),
    Role(
        "answer_completeness",
        "YOUR TASK: whether the solution ends in a definite answer. It must be worked out to the "
        "end, not promised, and not left as a formula that could still be evaluated. Do not ask "
        "whether it is right.\n"
        '- "So there are 12 apples." This is complete.\n'
        '- "The rest is the total less what was sold." This is not: there is no value.\n'
        '- "x = 3 * 7 - 2" This is not: the value was not computed.',
        f'End with the line "{PHRASE} True" if the answer is complete, and with "{PHRASE} False" '
        "if it is not.",
    ),
    Role(
        "answer_correct",
        "YOUR TASK: whether the final answer is right. Solve the problem on your own and compare "
        "your answer with that of the solution. How the solution got there does not matter.",
        f'End with the line "{PHRASE} True" if the final answer is right, and with "{PHRASE} '
        'False" if it is wrong or missing.',
    ),
    Role(
        "understanding_check",
        "YOUR TASK: whether the solution read the problem as it was meant. Its arithmetic does not "
        "matter.\n"
        "- It answers another question than the one asked: it did not understand.\n"
        "- It leaves out a condition, or one of several parts: it did not understand.\n"
        "- It takes a quantity for another, such as a price for a number: it did not understand.\n"
        "- It uses every condition and answers what is asked: it understood.",
        f'End with the line "{PHRASE} True" if the problem was understood, and with "{PHRASE} '
        'False" if it was not.',
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reward`, and what each role said: True approves, None was not asked."""

    reward: float
    roles: dict[str, bool | None]


def check_verifier(cfg: VerifierConfig) -> re.Pattern[str]:
    """The format rule. Raises DecodeError for weights that make no sense, and a pattern that is no
    regular expression."""
    weights = cfg.role_weights
    if len(weights) != len(ROLES) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise DecodeError(
            f"role_weights={list(weights)}: give {len(ROLES)} numbers of at least 0, not all "
            f"0, for {', '.join(role.name for role in ROLES)}"
        )
    try:
        return re.compile(cfg.format_pattern, re.DOTALL)
    except re.error as error:
        raise DecodeError(
            f"format_pattern={cfg.format_pattern!r} is no regular expression: {error}"
        ) from error


class SelfVerification:
    """`Reward`: the model's own verdict on an answer. `tau` is the least reward that is refused,
    for `cascade`; `chat` says whether the questions go through the chat template (None: if there is
    one).

    Counts "unparsed" replies, "solutions_cut" from the middle because the context is short, and
    with judge="both" in how many of "verdicts_compared" the two kinds "verdicts_agreed". Raises
    DecodeError for weights that are not four numbers of at least 0 with a sum above 0, and for a
    pattern that is no regular expression.
    """

    def __init__(
        self,
        engine: SearchEngine,
        config: VerifierConfig | None = None,
        *,
        tau: float = -0.2,
        compat: str = "fixed",
        seed: int = 0,
        chat: bool | None = None,
    ) -> None:
        self._engine, self._cfg = engine, config or VerifierConfig()
        self._tau, self._official = tau, compat == "official"
        self._seed, self._chat = seed, chat
        self._pattern = check_verifier(self._cfg)
        self._weights = dict(zip(ROLES, self._cfg.role_weights, strict=True))

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[float]:
        verdict = yield from self.verify(prompt, response, ledger)
        return verdict.reward

    def verify(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[Verdict]:
        """The reward of an answer with the roles' verdicts: one round of questions, or with
        `cascade` one for each weight."""
        ledger.num_reward_calls += 1
        case = _Case(prompt, response, self._questions(prompt, response, ledger))
        said: dict[str, bool | None] = {role.name: None for role in ROLES}
        total = sum(self._weights.values())
        lost = 0.0
        if self._cfg.format_weight:
            total += 0 if self._official else self._cfg.format_weight
            lost += 0 if self._pattern.search(response) else self._cfg.format_weight
        for roles in self._rounds():
            if self._cfg.cascade and -lost / total <= self._tau:
                break
            verdicts = yield from self._ask(case, roles, ledger)
            if ledger.was_cut:  # nobody knows what the rest of a reply would have said
                return Verdict(math.nan, dict.fromkeys(said))
            for role, verdict in zip(roles, verdicts, strict=True):
                said[role.name] = verdict
                lost += 0 if verdict else self._weights[role]
        return Verdict(-lost / total, said)

    def _rounds(self) -> list[list[Role]]:
        """Roles without weight are not asked."""
        roles = [role for role in ROLES if self._weights[role]]
        if not self._cfg.cascade:
            return [roles]
        roles.sort(key=lambda role: -self._weights[role])
        return [list(group) for _, group in groupby(roles, key=lambda role: self._weights[role])]

    def _ask(self, case: _Case, roles: Sequence[Role], ledger: Ledger) -> Search[list[bool]]:
        texts: list[Draw] = []
        if self._cfg.judge != "logprob":
            texts = self._draws(case, roles, ledger)
        words = [self._choose(case, role) for role in roles] if self._cfg.judge != "text" else []
        requests: list[Request] = [*texts, *words]
        replies = yield from ledger.ask(requests)
        likelier = [reply[0] > reply[1] for reply in replies[len(texts) :]]
        if not texts:
            return likelier
        verdicts = []
        for role, draw, reply in zip(roles, texts, replies, strict=False):
            allowed = draw.params.max_completion_length
            ledger.cuts([reply], allowed, self._longest(draw.ids))
            told = self._read(case.questions[role.name], reply.ids)
            ledger.counters["unparsed"] += told is None
            verdicts.append(bool(told))
        if likelier:
            agreed = [a == b for a, b in zip(verdicts, likelier, strict=True)]
            ledger.counters["verdicts_compared"] += len(agreed)
            ledger.counters["verdicts_agreed"] += sum(agreed)
        return verdicts

    def _read(self, question: tuple[int, ...], reply: Sequence[int]) -> bool | None:
        told = plain_text(self._engine.tokenizer, reply)
        if self._official:
            return official_verdict(plain_text(self._engine.tokenizer, question), told)
        return parse_verdict(told)

    def _draws(self, case: _Case, roles: Sequence[Role], ledger: Ledger) -> list[Draw]:
        limit = self._cfg.max_new_tokens
        limit = max(1, ledger.left(limit * len(roles)) // len(roles))
        name = f"{case.prompt.id}\n{case.response}"  # a text has its verdict, whenever it is asked
        draws: list[Draw] = []
        for role in roles:
            ids = case.questions[role.name]
            length = min(limit, self._longest(ids))
            params = SamplingParams(length, temperature=self._cfg.temperature)
            seed = sample_seed(self._seed, name, ROLES.index(role), 0)
            draws.append(Draw(ids, params, seed))
        return draws

    def _longest(self, ids: tuple[int, ...]) -> int:
        """Tokens of a reply, if there is no budget."""
        return min(self._cfg.max_new_tokens, self._engine.limits.max_len - len(ids))

    def _choose(self, case: _Case, role: Role) -> Request:
        shared, options = verdict_tokens(self._engine.tokenizer)
        return Choose((*case.questions[role.name], *shared), options)

    def _questions(
        self, prompt: Prompt, response: str, ledger: Ledger
    ) -> dict[str, tuple[int, ...]]:
        """Token ids of every role's question, the solution cut where they are too long."""
        max_len = self._engine.limits.max_len
        shared, _ = verdict_tokens(self._engine.tokenizer)
        reply = 0 if self._cfg.judge == "logprob" else self._cfg.max_new_tokens
        room = max_len - max(len(shared) + 1, min(reply, max_len // REPLY_SHARE))
        ids = self._engine.tokenizer(response, add_special_tokens=False)["input_ids"]
        solution, kept = response, len(ids)
        while True:
            questions = {role.name: self._question(role, prompt.text, solution) for role in ROLES}
            excess = max(len(question) for question in questions.values()) - room
            if excess <= 0:
                ledger.counters["solutions_cut"] += kept < len(ids)
                return questions
            if kept == 0:
                raise DecodeError(
                    f"the self-reward's questions about prompt {prompt.id!r} are {excess} tokens "
                    f"longer than the model's context of {max_len} allows even without the "
                    "solution: give another reward, or a model with a longer context"
                )
            kept = max(0, kept - excess)
            head, tail = ids[: kept - kept // 2], ids[len(ids) - kept // 2 :]
            solution = GAP.join(plain_text(self._engine.tokenizer, part) for part in (head, tail))

    def _question(self, role: Role, question: str, solution: str) -> tuple[int, ...]:
        for special in self._engine.tokenizer.all_special_tokens:
            solution = solution.replace(special, "")  # an answer must not end the user's turn
        text = _fill(HEAD, question=question, solution=solution) + f"{role.task}\n{role.end}"
        return encode_user_turn(self._engine.tokenizer, text, self._chat)


@dataclass(frozen=True, slots=True)
class _Case:
    """An answer before the roles."""

    prompt: Prompt
    response: str
    questions: dict[str, tuple[int, ...]]  # token ids, by role


def parse_verdict(reply: str) -> bool | None:
    """What a reply says: the word True or False that comes first after the last PHRASE, whatever
    its case and the markup around it. None where there is none, or where both are offered, as the
    instructions do ("True or False")."""
    words = re.sub(r"[*_`#>$\\\s]+", " ", reply).casefold()
    # Markup may stand inside the phrase, before its colon or after.
    _, phrase, rest = words.rpartition(PHRASE.casefold().rstrip(":"))
    found = re.search(r"\b(true|false)\b(['\"]*\s*(?:or\b|[/|])\s*['\"]*(?:true|false)\b)?", rest)
    if not phrase or found is None or found[2]:
        return None
    return found[1] == "true"


def official_verdict(question: str, reply: str) -> bool:
    """As the authors' code reads it: "true" anywhere after the last PHRASE of both texts."""
    return "true" in (question + reply).rpartition(PHRASE)[2].lower()


def verdict_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    """What the two verdicts have in common, and the tokens for True and for False that follow it.
    Raises DecodeError for a tokenizer that has no such tokens."""
    yes, no = (
        tokenizer(f"{PHRASE} {word}", add_special_tokens=False)["input_ids"]
        for word in ("True", "False")
    )
    pairs = enumerate(zip(yes, no, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), None)
    if place is None:
        raise DecodeError(
            "the model's tokenizer does not tell True from False: give a reward that asks no model"
        )
    return tuple(yes[:place]), (yes[place], no[place])


def _fill(text: str, **values: str) -> str:
    """`text` with {name} replaced; what is put in is not looked at again."""
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], text)
