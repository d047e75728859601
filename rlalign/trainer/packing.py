"""Which rows go through the model together: a plan of micro-batches for every process.

Rows go, longest first, to the process with the fewest tokens (LPT: Graham 1969, Bounds on
multiprocessing timing anomalies), so two processes differ by at most one row's tokens. Each
process then cuts its rows, still sorted, into runs with the smallest possible largest run: sorted
rows keep similar lengths together, which is what attention by buckets wants.

The plan depends on the lengths alone. It decides speed, never the gradient: weights of tokens were
fixed over the whole batch before.
"""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(
    lengths: Sequence[int], max_tokens: int, num_ranks: int = 1
) -> list[list[list[int]]]:
    """Row indices by process and micro-batch, each of at most `max_tokens` tokens.

    A row longer than that is a micro-batch alone. Every process gets the same number of
    micro-batches, the smallest that fits all of them; some may be empty, and must still be run, so
    that all processes take part in every collective. No rows: no micro-batches.
    Raises ValueError for a limit or a number of processes below 1.

    >>> micro_batches([3, 5, 2, 4], max_tokens=6, num_ranks=2)
    [[[1], [2]], [[3], [0]]]
    """
    if max_tokens < 1 or num_ranks < 1:
        raise ValueError(
            f"max_tokens is {max_tokens} and num_ranks {num_ranks}; both must be at least 1"
        )
    shares = _spread(lengths, num_ranks)
    count = max(len(_cut(rows, lengths, max_tokens)) for rows in shares)
    return [_cut_evenly(rows, lengths, max_tokens, count) for rows in shares]


def _spread(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Rows of each process, longest first."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += lengths[row]
    return shares


def _cut(rows: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive runs, each as long as `limit` tokens allow."""
    parts: list[list[int]] = []
    room = 0
    for row in rows:
        if not parts or lengths[row] > room:
            parts.append([])
            room = limit
        parts[-1].append(row)
        room -= lengths[row]
    return parts


def _cut_evenly(
    rows: Sequence[int], lengths: Sequence[int], max_tokens: int, count: int
) -> list[list[int]]:
    """`count` runs under the smallest limit that needs no more of them; empty ones at the end."""
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(rows, lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    parts = _cut(rows, lengths, high)
    return parts + [[] for _ in range(count - len(parts))]
