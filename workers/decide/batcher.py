"""When a batch runs, and which rows it holds. Pure: the clock and the waiting rows are arguments.

A batch is limited in rows and in seconds: a running batch cannot be interrupted, so all other work waits for it.

The device never idles for rows that are not expected. While a batch runs, the next one forms. A free device waits for
more rows only if rows keep arriving, the expected gain outweighs the wait of the rows already there, and the most
urgent row can spare the time; never longer than `max_wait`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.topology import RUN_STRETCH

QUIET = 3.0
"""Mean gaps without an arrival after which no more rows are expected: 5 % of Poisson gaps exceed three means."""

_SMOOTHING = 0.2
"""Weight of the newest gap in the moving average."""

Takes = Callable[[int, float], float]
"""Predicts a batch's seconds from its number of rows and the sum of their sizes."""

ALONE = math.inf
"""The gap when no two arrivals were close enough to share a batch."""


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Maximum rows in a batch, and maximum seconds that its first row waits for others.

    A batch of several rows takes at most `max_run` seconds, except as allowed by `RUN_STRETCH`.
    """

    max_batch: int
    max_wait: float
    max_run: float = math.inf


@dataclass(frozen=True, slots=True)
class WaitingRows:
    """The waiting rows of one variant and size bucket: count, and arrival times of the first and the last, in seconds.

    `start_by` is the latest start of a batch for the most urgent deadline, and `run` its predicted seconds.
    """

    rows: int
    oldest: float
    newest: float
    start_by: float = math.inf
    run: float = math.inf


@dataclass(frozen=True, slots=True)
class Share:
    """One job's waiting rows and their mean size. `deadline` is on the store's clock, infinite if there is none."""

    entry: int
    rows: int
    deadline: float
    arrived: float
    size: float = 1.0


@dataclass(frozen=True, slots=True)
class Portion:
    """The number of rows of one job in a batch."""

    entry: int
    rows: int


def ready(waiting: WaitingRows, now: float, policy: BatchPolicy, gap: float) -> float:
    """Seconds until the batch should run; 0 means now.

    `gap` is the mean seconds between arrivals close enough to share a batch (`observe_gap`), `ALONE` if no more are
    expected. Waiting costs each row one gap; it saves the next row from waiting for the whole batch it would miss.
    """
    full = waiting.rows >= policy.max_batch or policy.max_run <= waiting.run < math.inf
    if full or gap >= policy.max_wait or waiting.rows * gap >= waiting.run:
        return 0.0
    due = min(waiting.oldest + policy.max_wait, waiting.newest + QUIET * gap, waiting.start_by)
    return max(0.0, due - now)


def form(shares: Sequence[Share], policy: BatchPolicy, takes: Takes) -> list[Portion]:
    """The next batch: rows by deadline, then by arrival; as many as `fill` allows."""
    ordered = sorted(shares, key=urgency)
    front = cut([share.rows for share in ordered], policy.max_batch)
    sizes = [share.size for share, rows in zip(ordered, front, strict=False) for _ in range(rows)]
    taken = cut(front, fill(sizes, policy, takes))
    return [Portion(share.entry, rows) for share, rows in zip(ordered, taken, strict=False)]


def fill(sizes: Sequence[float], policy: BatchPolicy, takes: Takes) -> int:
    """How many of the first rows run together, by their sizes; at least one if any waits."""
    most = min(len(sizes), policy.max_batch)
    if most <= 1 or policy.max_run == math.inf or takes(most, sum(sizes[:most])) <= policy.max_run:
        return most
    bound = max(policy.max_run, RUN_STRETCH * takes(1, sizes[0]))
    total = sizes[0]
    for rows in range(1, most):
        total += sizes[rows]
        if takes(rows + 1, total) > bound:
            return rows
    return most


def cut(waiting: Sequence[int], room: int) -> list[int]:
    """How many rows to take from each of the first jobs to fill `room`; `waiting` has their row counts by urgency."""
    taken: list[int] = []
    for rows in waiting:
        if room == 0:
            break
        taken.append(min(rows, room))
        room -= taken[-1]
    return taken


def urgency(share: Share) -> tuple[float, float, int]:
    """Sort key of shares, most urgent first."""
    return share.deadline, share.arrived, share.entry


def observe_gap(gap: float, observed: float) -> float:
    """The mean gap after an arrival `observed` seconds after another that was still unanswered."""
    return observed if gap == ALONE else (1 - _SMOOTHING) * gap + _SMOOTHING * observed


def widen_gap(gap: float) -> float:
    """The mean gap after a batch that waited for more rows in vain."""
    return 2 * gap


def bucket_of(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that fits a row of `size`; else the largest. `buckets` ascend."""
    return buckets[min(bisect_left(buckets, size), len(buckets) - 1)]
