"""Which rows go through the model together: a plan of micro-batches for every process.

Rows with the same prompt belong together, since the prompt then runs once. Groups of them go,
largest first, to the process with the fewest tokens (LPT: Graham 1969, Bounds on multiprocessing
timing anomalies); so do halves and smaller pieces of groups, where that leaves the fullest process
with fewer tokens. Each process then cuts its rows, longest pieces first, into runs with the
smallest possible largest run.

The plan decides speed, never the gradient: weights of tokens were fixed over the whole batch
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PIECES = (1, 2, 4, 8)  # a group may be cut to these parts of a process's even share


class Row(NamedTuple):
    """Tokens of a row, and of its prompt, which rows with the same `key` run once together."""

    tokens: int
    key: int
    prompt_tokens: int


def micro_batches(
    rows: Sequence[Row], max_tokens: int, num_ranks: int = 1
) -> list[list[list[int]]]:
    """Row indices by process and micro-batch, each of at most `max_tokens` tokens to run.

    A row longer than that is a micro-batch alone. Every process gets the same number of
    micro-batches, the smallest that fits all of them; some may be empty, and must still be run, so
    that all processes take part in every collective. No rows: no micro-batches.
    Raises ValueError for a limit or a number of processes below 1.

    >>> rows = [Row(3, 0, 2), Row(5, 1, 1), Row(4, 0, 2)]  # the first and the last share a prompt
    >>> micro_batches(rows, max_tokens=6, num_ranks=2)
    [[[2, 0]], [[1]]]
    """
    if max_tokens < 1 or num_ranks < 1:
        raise ValueError(
            f"max_tokens is {max_tokens} and num_ranks {num_ranks}; both must be at least 1"
        )
    shares = _spread(_groups(rows), rows, num_ranks)
    count = max(len(_cut(share, rows, max_tokens)) for share in shares)
    return [_cut_evenly(share, rows, max_tokens, count) for share in shares]


def _groups(rows: Sequence[Row]) -> list[list[int]]:
    """Rows by key, longest first."""
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: (-rows[i].tokens, i)):
        groups.setdefault(rows[i].key, []).append(i)
    return list(groups.values())


def _spread(groups: list[list[int]], rows: Sequence[Row], num_ranks: int) -> list[list[int]]:
    """Rows of each process, the pieces with the longest row first."""
    if num_ranks == 1:
        return [[i for group in groups for i in group]]
    share = sum(_load(group, rows) for group in groups) / num_ranks
    plans = [_balance(groups, rows, num_ranks)]
    for parts in PIECES:
        pieces = [piece for group in groups for piece in _cut(group, rows, share / parts)]
        plans.append(_balance(pieces, rows, num_ranks))
    plans.append(_balance([[i] for group in groups for i in group], rows, num_ranks))
    # the first of equals: the coarsest
    return min(plans, key=lambda plan: max(_load(run, rows) for run in plan))


def _balance(pieces: list[list[int]], rows: Sequence[Row], num_ranks: int) -> list[list[int]]:
    shares: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for piece in sorted(pieces, key=lambda piece: -_load(piece, rows)):
        rank = loads.index(min(loads))
        shares[rank].append(piece)
        loads[rank] += _load(piece, rows)
    for share in shares:
        share.sort(key=lambda piece: (-rows[piece[0]].tokens, piece[0]))
    return [[i for piece in share for i in piece] for share in shares]


def _load(run: Sequence[int], rows: Sequence[Row]) -> int:
    """Tokens that rows `run` put through the model when they go together."""
    prompts = {rows[i].key: rows[i].prompt_tokens for i in run}
    return sum(prompts.values()) + sum(rows[i].tokens - rows[i].prompt_tokens for i in run)


def _cut(run: Sequence[int], rows: Sequence[Row], limit: float) -> list[list[int]]:
    """Consecutive runs, each as long as `limit` tokens allow."""
    parts: list[list[int]] = []
    keys: set[int] = set()
    room = 0.0
    for i in run:
        row = rows[i]
        tokens = row.tokens - (row.prompt_tokens if row.key in keys else 0)
        if not parts or tokens > room:
            parts.append([])
            keys, room, tokens = set(), limit, row.tokens
        parts[-1].append(i)
        keys.add(row.key)
        room -= tokens
    return parts


def _cut_evenly(
    run: Sequence[int], rows: Sequence[Row], max_tokens: int, count: int
) -> list[list[int]]:
    """`count` runs under the smallest limit that needs no more of them; empty ones at the end."""
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(run, rows, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    parts = _cut(run, rows, high)
    return parts + [[] for _ in range(count - len(parts))]
