"""RAIN as it was published, for comparison: one prompt at a time, batches of one, an embedding call
a text. Each candidate and each rollout reads the whole prefix again and then goes on from its own
key-value cache, which nothing else uses.

Rules are those of the published code, written anew from their description: a running range of q
(inert here), unvisited children at -1, ties to the first, children of one token by id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

LENGTHS = (1, 2, 4, 10)


@dataclass(eq=False)
class Branch:
    tokens: list[int]
    p: float
    parent: Branch | None = None
    step: int = 0
    n: float = 0.0
    visits: int = 0
    q: float = 0.0
    mean: np.ndarray | None = None
    children: list[Branch] = field(default_factory=list)


class Literal:
    """`score(text)` is the scorer, `embed(text)` one vector. `forwards` counts the model's passes,
    `token_forwards` the tokens they read (those in a cache are not read again), `generated` the
    tokens drawn."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        score: Callable[[str], float],
        embed: Callable[[str], np.ndarray],
        *,
        seed: int = 0,
        room: int = 64,
        q: int = 10,
        top_k: int = 15,
        c: float = 2.0,
        searches: int = 50,
        fresh: int = 15,
        min_visits: int = 6,
        threshold: float = 0.8,
        boundary: str = ",.?:;\n",
    ) -> None:
        self.model, self.tokenizer, self.score, self.embed = model, tokenizer, score, embed
        self.eos, self.room, self.q, self.top_k, self.c = tokenizer.eos_token_id, room, q, top_k, c
        self.searches, self.fresh, self.boundary = searches, fresh, boundary
        self.min_visits, self.threshold = min_visits, threshold
        self.random = torch.Generator().manual_seed(seed)
        self.forwards = self.token_forwards = self.generated = self.num_searches = 0

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """The outer loop."""
        root, committed, inherited = Branch([], 1.0), [], 0
        while not self._ends(committed):
            for _ in range(inherited, max(self.searches, inherited + self.fresh)):
                self._search(root, list(prompt), committed)
                best = max(root.children, key=lambda x: (x.n, x.q))
                if best.visits > self.min_visits and best.q > self.threshold:
                    break
            best = max(root.children, key=lambda x: (x.n, x.q))
            committed = committed + best.tokens
            root, root.parent = best, None
            inherited = best.visits
            self._mix(root)
        return committed

    def _search(self, root: Branch, prompt: list[int], committed: list[int]) -> None:
        self.num_searches += 1
        node, path, tokens = root, [root], list(committed)
        while node.children:
            self._add_child(node, prompt + tokens)
            spread = math.sqrt(node.n)
            low, high = -1.0, 1.0
            node = max(
                node.children,
                key=lambda x: (
                    ((x.q - low) / (high - low + 1e-5) if x.n else 0.0)
                    + self.c * x.p * spread / (1 + x.n)
                ),
            )
            path.append(node)
            tokens = tokens + node.tokens
        rolled: list[int] = []
        ends = self._ends(tokens)
        ids, cache = prompt + tokens, None
        while not self._ends(tokens + rolled) and not self._at_boundary(prompt, tokens + rolled):
            logits_V, cache = self._read(ids, cache)
            rolled.append(self._draw(logits_V.softmax(-1)))
            ids = rolled[-1:]
        value = self.score(self._text(tokens + rolled))
        if not ends:
            self._expand(node, root, prompt, tokens)
        self._backup(path, rolled, value)

    def _expand(self, node: Branch, root: Branch, prompt: list[int], tokens: list[int]) -> None:
        length = min(LENGTHS[min(node.step, 3)], self.room - len(tokens))
        if length == 1:
            p_V = self._read(prompt + tokens)[0].softmax(-1)
            top = p_V.topk(self.q)
            sets = sorted((([i], p) for p, i in zip(*map(torch.Tensor.tolist, top), strict=True)),
                          key=lambda item: item[0])  # fmt: skip
        else:
            sets = [self._sequence(prompt + tokens, length, greedy=True)]
            for _ in range(self.q - 1):
                drawn = self._sequence(prompt + tokens, length, greedy=False)
                if drawn[0] not in [own for own, _ in sets]:
                    sets.append(drawn)
            if others := [p for _, p in sets[1:]]:
                p = max(min(sets[0][1], sum(others)), max(others) + min(others))
                sets[0] = (sets[0][0], p)
        total = sum(p for _, p in sets)
        node.children = [Branch(own, p / total, node, node.step + 1) for own, p in sets]
        if node is root:
            self._mix(node)

    def _sequence(self, ids: list[int], length: int, *, greedy: bool) -> tuple[list[int], float]:
        tokens, p, cache = [], 1.0, None
        while len(tokens) < length and (not tokens or tokens[-1] != self.eos):
            logits_V, cache = self._read(tokens[-1:] or ids, cache)
            top = logits_V.topk(self.top_k)
            p_K = top.values.softmax(-1)
            place = 0 if greedy else self._draw(p_K)
            tokens.append(int(top.indices[place]))
            self.generated += greedy
            p *= float(p_K[place])
        return tokens, p

    def _add_child(self, node: Branch, ids: list[int]) -> None:
        means = [child.mean for child in node.children if child.mean is not None]
        full = len(node.children) >= 20 or len(means) < len(node.children) or len(means) < 2
        if full or max(child.q for child in node.children) >= 0:
            return
        size = len(node.children[0].tokens)
        if np.linalg.norm(np.var(means, axis=0, ddof=1)) >= 0.03 * size:
            return
        known = [child.tokens for child in node.children]
        if size == 1:
            top = self._read(ids)[0].softmax(-1).topk(len(known) + 1)
            found = [([int(i)], float(p)) for i, p in zip(top.indices, top.values, strict=True)]
        else:
            self._sequence(ids, size, greedy=True)
            found = [self._sequence(ids, size, greedy=False)]
        for tokens, p in found:
            if tokens not in known:
                node.children.append(Branch(tokens, p / (1 + p), node, node.step + 1))

    def _backup(self, path: list[Branch], rolled: list[int], value: float) -> None:
        tokens = list(rolled)
        for node in reversed(path):
            node.n += 1
            node.visits += 1
            tokens = node.tokens + tokens
            if node is not path[0]:
                vector = self.embed(self._text(tokens))
                mean = np.zeros_like(vector) if node.mean is None else node.mean
                node.mean = mean + (vector - mean) / node.visits
                for other in path[path.index(node) - 1].children:
                    if other is node or other.mean is None:
                        continue
                    size = np.linalg.norm(node.mean) * np.linalg.norm(other.mean)
                    similarity = float(node.mean @ other.mean / size)
                    if similarity >= 0.95:
                        other.n += 0.2 * similarity
                        other.q += 0.2 * similarity / other.n * (value - other.q)
            node.q += (value - node.q) / node.n

    def _mix(self, root: Branch) -> None:
        for child in root.children:
            child.p = 0.75 * child.p + 0.25 / len(root.children)

    @torch.no_grad()
    def _read(self, ids: list[int], cache: Any = None) -> tuple[torch.Tensor, Any]:
        """The next token's logits after `ids`, which follow what is in `cache`; and their cache."""
        self.forwards += 1
        self.token_forwards += len(ids)
        out = self.model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return out.logits[0, -1].float(), out.past_key_values

    def _draw(self, p_V: torch.Tensor) -> int:
        self.generated += 1
        return int(torch.multinomial(p_V, 1, generator=self.random))

    def _ends(self, tokens: list[int]) -> bool:
        return len(tokens) >= self.room or (bool(tokens) and tokens[-1] == self.eos)

    def _at_boundary(self, prompt: list[int], tokens: list[int]) -> bool:
        text = self._text((tokens or prompt)[-1:])
        return text[-1:] in self.boundary and text != ""

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
