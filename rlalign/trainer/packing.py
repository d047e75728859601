"""Which rows go through the model together: a plan of micro-batches for every process.

What rows begin with in common runs once where they go together, so rows come here in an order in
which those with most in common are neighbours (trainer/rows.py), and a micro-batch is a run of
them. Groups of rows with the same prompt go, those with most tokens first, to the process with the
fewest (LPT: Graham 1969, Bounds on multiprocessing timing anomalies); so do halves and smaller
pieces of groups, where that leaves the fullest process with fewer tokens. Each process then cuts
its rows into runs with the smallest possible largest run.

The plan decides speed, never the gradient: weights of tokens were fixed over the whole batch
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

PIECES = (1, 2, 4, 8)  # a group may be cut to these parts of a process's even share


class Row(NamedTuple):
    """Tokens that a row runs alone, the number of its prompt, and how many of its first tokens are
    those of the row before it in the list."""

    tokens: int
    key: int
    shared: int


def micro_batches(
    rows: Sequence[Row], max_tokens: int, num_ranks: int = 1
) -> list[list[list[int]]]:
    """Row indices by process and micro-batch, each of at most `max_tokens` tokens to run.

    A row longer than that is a micro-batch alone. Every process gets the same number of
    micro-batches, the smallest that fits all of them; some may be empty, and must still be run, so
    that all processes take part in every collective. No rows: no micro-batches.
    Raises ValueError for a limit or a number of processes below 1.

    >>> rows = [Row(4, 0, 0), Row(3, 0, 2), Row(5, 1, 0)]  # the second has 1 token of its own
    >>> micro_batches(rows, max_tokens=6, num_ranks=2)
    [[[0, 1]], [[2]]]
    """
    if max_tokens < 1 or num_ranks < 1:
        raise ValueError(
            f"max_tokens is {max_tokens} and num_ranks {num_ranks}; both must be at least 1"
        )
    shares = _spread(rows, num_ranks)
    count = max(len(_cut(share, _added(share, rows), rows, max_tokens)) for share in shares)
    return [_cut_evenly(share, rows, max_tokens, count) for share in shares]


def load(run: Sequence[int], rows: Sequence[Row]) -> int:
    """Tokens that the rows with indices `run`, ascending, put through the model together.

    Exact where the order of `rows` is lexicographic: two of them then have as many first tokens in
    common as the neighbours between them that have fewest.
    """
    return sum(_added(run, rows))


def _added(run: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """Tokens that each row of a run adds to those of the rows before it."""
    tokens = [rows[i].tokens for i in run]
    for at, (i, j) in enumerate(pairwise(run), start=1):
        tokens[at] -= min(row.shared for row in rows[i + 1 : j + 1])
    return tokens


def _spread(rows: Sequence[Row], num_ranks: int) -> list[list[int]]:
    """Rows of each process."""
    everything = list(range(len(rows)))
    if num_ranks == 1:
        return [everything]
    members: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.key, []).append(i)
    groups = list(members.values())
    share = sum(load(group, rows) for group in groups) / num_ranks
    plans = [_balance(groups, rows, num_ranks)]
    for parts in PIECES:
        pieces = [
            piece
            for group in groups
            for piece in _cut(group, _added(group, rows), rows, share / parts)
        ]
        plans.append(_balance(pieces, rows, num_ranks))
    plans.append(_balance([[i] for i in everything], rows, num_ranks))
    # the first of equals: the coarsest
    return min(plans, key=lambda plan: max(load(run, rows) for run in plan))


def _balance(pieces: list[list[int]], rows: Sequence[Row], num_ranks: int) -> list[list[int]]:
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    sizes = [load(piece, rows) for piece in pieces]
    for size, piece in sorted(zip(sizes, pieces, strict=True), key=lambda pair: -pair[0]):
        rank = loads.index(min(loads))
        shares[rank] += piece
        loads[rank] += size
    return [sorted(share) for share in shares]


def _cut(
    run: Sequence[int], added: Sequence[int], rows: Sequence[Row], limit: float
) -> list[list[int]]:
    """Consecutive runs, each as long as `limit` tokens allow."""
    parts: list[list[int]] = []
    room = 0.0
    for i, tokens in zip(run, added, strict=True):
        if not parts or tokens > room:
            parts.append([])
            room, tokens = limit, rows[i].tokens
        parts[-1].append(i)
        room -= tokens
    return parts


def _cut_evenly(
    run: Sequence[int], rows: Sequence[Row], max_tokens: int, count: int
) -> list[list[int]]:
    """`count` runs under the smallest limit that needs no more of them; empty ones at the end."""
    added = _added(run, rows)
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(run, added, rows, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    parts = _cut(run, added, rows, high)
    return parts + [[] for _ in range(count - len(parts))]
