"""When a batch runs, and which rows it holds. Pure: the clock and the waiting rows are arguments.

A batch is limited in rows, in seconds, and by its rows' deadlines: a running batch cannot be interrupted, so all other
work waits for it.

The device never idles for rows that are not expected. While a batch runs, the next one forms. A free device waits for
more rows only if rows keep arriving, the expected gain outweighs the wait of the rows already there, and the most
urgent row can spare the time; never longer than `max_wait`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

from tasks.topology import RUN_STRETCH

QUIET = 3.0
"""Mean gaps without an arrival after which no more rows are expected: 5 % of Poisson gaps exceed three means."""

SPARE = 0.1
"""Share of the time until a row is due that its batch leaves free, as predictions err."""

GIVE_UP = 2.0
"""The most urgent rows are given up for a batch with so many times as many rows per second.

With 1.25, a saturated fleet of image generators answered 1.4 points fewer live requests in time (Alibaba GenTD26)."""

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


class Row(NamedTuple):
    """A waiting row. Rows are ordered as they run: by priority level (0 first), then by deadline.

    `deadline` is on the clock of `form`, infinite if there is none.
    """

    level: int
    deadline: float
    size: float


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


def form(ordered: Iterable[Row], policy: BatchPolicy, takes: Takes, now: float) -> list[int]:
    """The places of the rows that run together next, of all that wait in order; at least one if any waits.

    Several rows run together only if that ends before each of them is due. Rows that are late even alone run last.
    Where the rows behind a batch that is kept short could not follow in time, its first rows are given up for a batch
    with `GIVE_UP` times as many per second, else a device that was held up once would stay behind.
    Twice as many rows are looked at as a batch may hold, and only where deadlines bind.
    """
    rows = list(islice(waiting := iter(ordered), policy.max_batch))
    forming = _Forming(rows, policy, takes)
    full = forming.batch(range(len(rows)), _NEVER_LATE)
    if not rows or forming.in_time(full, now):
        return list(full)
    rows += islice(waiting, policy.max_batch)
    hopeful = [place for place, row in enumerate(rows) if now + takes(1, row.size) <= row.deadline]
    if not hopeful:
        return list(full)
    first = forming.batch(hopeful, now)
    behind = forming.batch(hopeful[len(first) :], _NEVER_LATE)
    if not behind or forming.in_time(behind, now + forming.seconds(first)):
        return list(first)
    others = [forming.batch(hopeful[2**n :], now) for n in range((len(hopeful) - 1).bit_length())]
    worth = partial(forming.worth, level=rows[hopeful[0]].level)
    best = max(others, key=worth)
    return list(best if worth(best) > GIVE_UP * worth(first) else first)


_NEVER_LATE = -math.inf  # a start at which no row will be late


@dataclass(frozen=True, slots=True)
class _Forming:
    """The batches that could be formed; each is named by the places of its rows, most urgent first."""

    rows: Sequence[Row]
    policy: BatchPolicy
    takes: Takes

    def batch(self, waiting: Sequence[int], start: float) -> Sequence[int]:
        """The first of these rows, and as many of those behind it as fit into `max_run` and are in time."""

        def fits(rows: int) -> bool:
            return self._short(waiting[:rows]) and (start == _NEVER_LATE or self.in_time(waiting[:rows], start))

        most = min(len(waiting), self.policy.max_batch)
        if most <= 1 or fits(most):
            return waiting[:most]
        return waiting[: 1 + bisect_left(range(2, most), True, key=lambda rows: not fits(rows))]

    def seconds(self, places: Sequence[int]) -> float:
        """Predicted seconds of the batch."""
        return self.takes(len(places), sum([self.rows[place].size for place in places]))

    def in_time(self, places: Sequence[int], start: float) -> bool:
        """Whether the batch ends before any of its rows is due."""
        due = min([self.rows[place].deadline for place in places])
        return self.seconds(places) <= (1 - SPARE) * (due - start)

    def _short(self, places: Sequence[int]) -> bool:
        """Whether the batch is within `max_run`."""
        bound = self.policy.max_run
        if bound == math.inf or (seconds := self.seconds(places)) <= bound:
            return True
        return seconds <= RUN_STRETCH * self.seconds(places[:1])

    def worth(self, places: Sequence[int], level: int) -> float:
        """Rows of the level per second."""
        return sum(self.rows[place].level == level for place in places) / self.seconds(places)


def observe_gap(gap: float, observed: float) -> float:
    """The mean gap after an arrival `observed` seconds after another that was still unanswered."""
    return observed if gap == ALONE else (1 - _SMOOTHING) * gap + _SMOOTHING * observed


def widen_gap(gap: float) -> float:
    """The mean gap after a batch that waited for more rows in vain."""
    return 2 * gap


def bucket_of(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that fits a row of `size`; else the largest. `buckets` ascend."""
    return buckets[min(bisect_left(buckets, size), len(buckets) - 1)]
