"""When a batch runs, and which rows are in it. Pure: the clock and what waits are arguments.

A batch is bounded in rows and in seconds: a batch that runs is not interrupted, so it is what others wait for.

The device never idles for rows that are not expected. A batch forms by itself while the one before it runs; a free
device waits for more rows only while rows keep coming and are worth the wait of those that are there, while the most
urgent one can spare the time, and never longer than `max_wait`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.topology import RUN_STRETCH

QUIET = 3.0
"""Gaps without an arrival after which no more rows are expected: 5 % of Poisson gaps are longer than three means."""

_SMOOTHING = 0.2
"""Weight of the newest gap in the mean."""

Takes = Callable[[int, float], float]
"""Seconds that a batch takes: of so many rows, whose sizes have this sum."""

ALONE = math.inf
"""The gap where no two arrivals were close enough to share a batch."""


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Most rows in a batch, and the longest that its first row waits for the others, in seconds.

    A batch of several rows takes at most `max_run` seconds, except as `RUN_STRETCH` says.
    """

    max_batch: int
    max_wait: float
    max_run: float = math.inf


@dataclass(frozen=True, slots=True)
class WaitingRows:
    """The rows of one variant and size bucket that wait: how many, and when the first and the last came, in seconds.

    `start_by` is when a batch must start at the latest for the most urgent deadline, and `run` what it takes.
    """

    rows: int
    oldest: float
    newest: float
    start_by: float = math.inf
    run: float = math.inf


@dataclass(frozen=True, slots=True)
class Share:
    """One job's waiting rows, of a mean size. `deadline` is by the store's clock, infinite where there is none."""

    entry: int
    rows: int
    deadline: float
    arrived: float
    size: float = 1.0


@dataclass(frozen=True, slots=True)
class Portion:
    """How many rows of one job are in a batch."""

    entry: int
    rows: int


def ready(waiting: WaitingRows, now: float, policy: BatchPolicy, gap: float) -> float:
    """Seconds until the batch should run; 0 means now.

    `gap` is the mean of seconds between arrivals close enough to share a batch (`observe_gap`), `ALONE` where no more
    are expected. To wait costs each row a gap; it saves the next one the whole run of a batch that it misses.
    """
    full = waiting.rows >= policy.max_batch or policy.max_run <= waiting.run < math.inf
    if full or gap >= policy.max_wait or waiting.rows * gap >= waiting.run:
        return 0.0
    due = min(waiting.oldest + policy.max_wait, waiting.newest + QUIET * gap, waiting.start_by)
    return max(0.0, due - now)


def form(shares: Sequence[Share], policy: BatchPolicy, takes: Takes) -> list[Portion]:
    """The next batch: rows by deadline, then by arrival; as many as `fill` says."""
    ordered = sorted(shares, key=urgency)
    front = cut([share.rows for share in ordered], policy.max_batch)
    sizes = [share.size for share, rows in zip(ordered, front, strict=False) for _ in range(rows)]
    taken = cut(front, fill(sizes, policy, takes))
    return [Portion(share.entry, rows) for share, rows in zip(ordered, taken, strict=False)]


def fill(sizes: Sequence[float], policy: BatchPolicy, takes: Takes) -> int:
    """How many of the first rows run together, by their sizes: at least one where there is one."""
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
    """How many rows of each of the first jobs fill `room`, where so many wait; `waiting` is in the order of urgency."""
    taken: list[int] = []
    for rows in waiting:
        if room == 0:
            break
        taken.append(min(rows, room))
        room -= taken[-1]
    return taken


def urgency(share: Share) -> tuple[float, float, int]:
    """Sorts shares, most urgent first."""
    return share.deadline, share.arrived, share.entry


def observe_gap(gap: float, observed: float) -> float:
    """The mean gap after an arrival that came `observed` seconds after another while that one was still here."""
    return observed if gap == ALONE else (1 - _SMOOTHING) * gap + _SMOOTHING * observed


def widen_gap(gap: float) -> float:
    """The mean gap after a batch that waited for more rows in vain."""
    return 2 * gap


def bucket_of(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that a row of `size` fits in; the largest where none does. `buckets` ascend."""
    return buckets[min(bisect_left(buckets, size), len(buckets) - 1)]
