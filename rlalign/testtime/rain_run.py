"""What one prompt's RAIN search works with: its account, where answers end, scores, embeddings."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rlalign.config.testtime import RainConfig
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Draw, Request, Search, SearchEngine, together
from rlalign.rollout.seeds import rain_seed
from rlalign.testtime import rain_candidates as candidates
from rlalign.testtime.embed import Embeddings, load_embeddings
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.prompt import Prompt, plain_text
from rlalign.testtime.rain_tree import Node, Tree, Vector, best_child
from rlalign.testtime.result import Result, make_result
from rlalign.testtime.rewards import Reward
from rlalign.testtime.run import longest, new_ledger
from rlalign.types import FINISH_LENGTH, FINISH_STOP

CANDIDATE, ROLLOUT = 0, 1  # what is drawn at a node: keys seeds
SCORES = 4096  # of texts, kept for one prompt
TOKENIZERS = 8  # whose boundary tokens are kept


class Run:
    """What one prompt's search works with."""

    def __init__(
        self, engine: SearchEngine, prompt: Prompt, scorer: Reward, cfg: RainConfig
    ) -> None:
        check(cfg)
        self.prompt, self.cfg, self.tokenizer = prompt, cfg, engine.tokenizer
        self.official = cfg.compat == "official"
        self.ledger = new_ledger(cfg)
        self.ends = Ends(engine, prompt, cfg)
        self.attempt = 0
        self._scorer = scorer
        self._scores: OrderedDict[str, float] = OrderedDict()
        self._embeddings = _embeddings(cfg)

    def over(self) -> str:
        """The budget that is used up, by its name; "": none."""
        most = self.cfg.max_total_searches
        if most and self.ledger.counters["searches"] >= most:
            return "max_total_searches"
        return self.ledger.over()

    def accepts(self, child: Node) -> bool:
        return child.visits > self.cfg.min_visits and child.q > self.cfg.value_threshold

    def accepts_best(self, root: Node) -> bool:
        return self.accepts(best_child(root, official=self.official))

    def answer(self, tree: Tree, path: Sequence[Node]) -> tuple[int, ...]:
        """Tokens of the answer down to the end of a path from the root."""
        return sum((node.tokens for node in path[1:]), tree.committed)

    def set_length(self, node: Node, before: tuple[int, ...]) -> int:
        """Tokens of the sets that follow a node."""
        lengths = self.cfg.set_lengths
        return min(lengths[min(node.depth, len(lengths) - 1)], self.ends.room - len(before))

    def seed(self, node: Node, kind: int, index: int) -> int:
        return rain_seed(self.cfg.seed, self.prompt.id, self.attempt, node.id, kind, index)

    def rollout(self, leaf: Node, before: tuple[int, ...]) -> Draw:
        """Request for what follows a leaf, up to a boundary."""
        seed = self.seed(leaf, ROLLOUT, leaf.num_rollouts)
        leaf.num_rollouts += 1
        params = SamplingParams(
            self.ledger.left(self.ends.room - len(before)),
            self.cfg.rollout.temperature,
            stop_token_ids=tuple(self.ends.boundaries),
        )
        return Draw(self.prompt.ids + before, params, seed)

    def draws(self, leaf: Node, before: tuple[int, ...], length: int) -> Sequence[Request]:
        """Requests for the children of a leaf."""
        found = candidates.draws(
            self.prompt.ids + before, length, self.cfg, lambda i: self.seed(leaf, CANDIDATE, i)
        )
        leaf.num_draws = len(found)
        return found

    def weigh(self, text: str, parts: Sequence[str]) -> Search[tuple[float, list[Vector | None]]]:
        """In one round: v of an answer so far, and the embeddings of parts of it."""
        asked: list[Search[Any]] = [self.value(text), self.embed(parts)]
        value, vectors = yield from together(asked)
        return value, vectors

    def value(self, text: str) -> Search[float]:
        """v of an answer so far: its score on [-1, 1], -1 where there is none."""
        low, high = self.cfg.score_range
        score = yield from self.score(text)
        if math.isnan(score):
            self.ledger.counters["unscored"] += 1
            return -1.0
        return min(1.0, max(-1.0, 2 * (score - low) / (high - low) - 1))

    def score(self, text: str) -> Search[float]:
        """Of an answer so far, by the scorer; each text is scored once while it is remembered."""
        if text not in self._scores:
            score = yield from self._scorer(self.prompt, text, self.ledger)
            if math.isnan(score):  # what failed may not fail again
                return score
            self._scores[text] = score
            if len(self._scores) > SCORES:
                self._scores.popitem(last=False)
        self._scores.move_to_end(text)
        return self._scores[text]

    def embed(self, texts: Sequence[str]) -> Search[list[Vector | None]]:
        """One embedding a text; None where there is none."""
        if self._embeddings is None:
            return [None] * len(texts)
        vectors = yield from self._embeddings(texts)
        if bad := sum(vector is None for vector in vectors):
            self.ledger.counters["bad_embeddings"] += bad
        return vectors

    def result(self, tokens: tuple[int, ...], reason: str, trace: dict[str, Any]) -> Search[Result]:
        """The result for an answer, with its score."""
        text = self.ends.text(tokens)
        score = None if reason == "refused" else (yield from self.score(text))
        done = bool(tokens) and self.ends.why(tokens) != "length"
        return make_result(
            self.prompt,
            self.ledger,
            text=text,
            token_ids=tokens,
            finish=FINISH_STOP if done or reason == "refused" else FINISH_LENGTH,
            stop_reason=reason,
            reward=score,
            trace=trace,
        )


class Ends:
    """Of one prompt: the answer ends with an end-of-sequence token, when another turn opens, or
    with `room` tokens."""

    def __init__(self, engine: SearchEngine, prompt: Prompt, cfg: RainConfig) -> None:
        self.room = longest(engine, prompt.ids, cfg.max_new_tokens)
        self.boundaries = boundary_ids(engine.tokenizer, cfg.rollout.boundary, engine.limits.vocab)
        self._tokenizer, self._eos_ids = engine.tokenizer, engine.eos_ids
        self._marker = cfg.rollout.turn_marker
        self._before = prompt.ids[-1:] if cfg.compat == "official" else ()

    def text(self, tokens: Sequence[int]) -> str:
        """An answer as people read it, up to where another turn opens."""
        text = plain_text(self._tokenizer, tokens)
        return text.partition(self._marker)[0] if self._marker else text

    def close(
        self, before: tuple[int, ...], tokens: tuple[int, ...]
    ) -> tuple[tuple[int, ...], bool]:
        """`tokens` after those of the answer so far, up to where it ends in them, and whether it
        does."""
        turns = self._opens_turn(before + tokens)
        for count, token in enumerate(tokens, 1):
            over = token in self._eos_ids or len(before) + count >= self.room
            if over or (turns and self._opens_turn(before + tokens[:count])):
                return tokens[:count], True
        return tokens, False

    def why(self, tokens: tuple[int, ...]) -> str:
        """What ended a finished answer: eos, turn or length."""
        if tokens and tokens[-1] in self._eos_ids:
            return "eos"
        return "turn" if self._opens_turn(tokens) else "length"

    def at_boundary(self, tokens: tuple[int, ...]) -> bool:
        """Whether an answer so far is scored as it stands. The published code looks at the prompt's
        end where there is no answer yet."""
        last = tokens[-1:] or self._before
        return bool(last) and last[0] in self.boundaries

    def _opens_turn(self, tokens: tuple[int, ...]) -> bool:
        return bool(self._marker) and self._marker in plain_text(self._tokenizer, tokens)


def check(cfg: RainConfig) -> None:
    """Raises DecodeError for lists that make no sense, and an embedder that cannot be loaded."""
    if not cfg.set_lengths or min(cfg.set_lengths) < 1:
        raise DecodeError(f"set_lengths={cfg.set_lengths}: give one or more lengths from 1")
    if len(cfg.score_range) != 2 or not cfg.score_range[0] < cfg.score_range[1]:
        raise DecodeError(f"score_range={cfg.score_range}: give the lowest score and the highest")
    _embeddings(cfg)


def _embeddings(cfg: RainConfig) -> Embeddings | None:
    needed = cfg.gamma_sim > 0 or cfg.max_children > 0
    return load_embeddings(cfg.embedder) if needed else None


@lru_cache(maxsize=TOKENIZERS)
def boundary_ids(tokenizer: Any, characters: str, vocab: int) -> frozenset[int]:
    """The tokens whose text ends in one of `characters`: as a set of ids they stop at the very
    token, where a stop string would also fire inside one."""
    if not characters:
        return frozenset()
    known = min(vocab, len(tokenizer))
    texts = tokenizer.batch_decode(
        [[i] for i in range(known)], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return frozenset(i for i, text in enumerate(texts) if text and text[-1] in characters)
