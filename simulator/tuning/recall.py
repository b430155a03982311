"""Which recorded arrivals a plan is made for: the latest ones, unless an earlier time was more like now. Pure.

Traffic comes back: nights, mornings, campaigns. Just after rates have changed, the last minutes are mostly of what is
over, and an earlier time at which requests came as they do now says more of what follows, its bursts included.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.traces import Trace
from tasks.history import Arrivals, joined

BLOCK = 30.0
"""Seconds whose arrivals are counted together, and stay together where others are drawn: bursts last about as long."""

SOON, NOW = 2, 4
"""Blocks that say how requests come now: the fewer if these show a change, otherwise the more."""

SURE = 4.0
"""A model's rate has changed if it differs from what it was by this many standard errors.

Source: the trial `steady` with a history: before 780 s, 3 took bursts for a change with five seeds of eight, 4 with
none."""

ALIKE_WITHIN = 0.2
"""Rates that differ by less than this share are alike, however many requests show it."""

CLEARLY = 0.5
"""An earlier time is played if it differs from now by at most this share of what the latest differs, in squares."""

COUNTS_KEPT = 86400.0
"""Seconds for which counts are remembered: a day, as traffic comes back daily."""

Counts = NDArray[np.float64]
"""Requests by model and block, shape (models, blocks); the last block has just ended."""


def counts_of(trace: Trace, begin: float, end: float) -> Counts:
    """The requests of a trace by model and block, from `begin` to `end`."""
    edges = np.arange(begin, end + BLOCK / 2, BLOCK)
    models = range(len(trace.models))
    return np.array([np.histogram(trace.arrival[trace.model == model], edges)[0] for model in models], np.float64)


class Alike(NamedTuple):
    """An earlier time that was like now: when it begins, and for how many of the last seconds they came as now."""

    begin: float
    recent: float


def alike(trace: Trace, now: float, span: float, played: float | None = None) -> Alike | None:
    """The `span` seconds of a trace that resemble the last ones before `now`, as `recalled`."""
    began = now - BLOCK * (now // BLOCK)
    return _in_seconds(counts_of(trace, began, now), span, began, played)


def _in_seconds(counts: Counts, span: float, began: float, played: float | None) -> Alike | None:
    """As `recalled`, of counts whose first block has `began` then."""
    first = None if played is None else round((played - began) / BLOCK)
    found = recalled(counts, int(span // BLOCK), first)
    return None if found is None else Alike(began + BLOCK * found[0], BLOCK * found[1])


def recalled(counts: Counts, length: int, played: int | None = None) -> tuple[int, int] | None:
    """The first of `length` blocks that resemble the last ones clearly more than those do that were `played`.

    Returns it and how many the last ones are; None if rates are as they were, or never were like now. `played` is the
    first of the blocks that a plan was made for; None for those just before the last ones.
    """
    for now in (SOON, NOW):
        if counts.shape[1] <= length + now:
            return None
        differ = _differences(counts, length, now)
        former = differ.shape[1] - 1 if played is None else min(max(played, 0), differ.shape[1] - 1)
        if differ[:, former].max() > SURE**2:
            total = differ.sum(axis=0)
            best = len(total) - 1 - int(np.argmin(total[::-1]))
            return (best, now) if total[best] <= CLEARLY * total[former] else None
    return None


def _differences(counts: Counts, length: int, last: int) -> Counts:
    """By how many standard errors each stretch's rates differ from now, squared; shape (models, stretches).

    Requests come unevenly. How unevenly, the steps from block to block tell: unlike the variance, they do not grow with
    a change that lasts.
    """
    now = counts[:, -last:].mean(axis=1, keepdims=True)
    means = np.lib.stride_tricks.sliding_window_view(counts[:, :-last], length, axis=1).mean(axis=2)
    uneven = (np.diff(counts, axis=1) ** 2).mean(axis=1) / 2 / np.maximum(counts.mean(axis=1), 1 / BLOCK)
    rate = np.maximum((means * length + now * last) / (length + last), 1 / BLOCK)
    chance = rate * np.maximum(uneven, 1.0)[:, None] * (1 / length + 1 / last)
    differ: Counts = (means - now) ** 2 / (chance + (rate * ALIKE_WITHIN / SURE) ** 2)
    return differ


class Traffic:
    """How many requests of each model and locality came in each block of the last `COUNTS_KEPT` seconds."""

    def __init__(self) -> None:
        self._blocks: dict[int, Counter[tuple[str, str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def add(self, arrivals: Arrivals, begin: float, end: float) -> None:
        """Count the whole blocks from `begin` to `end`, whose arrivals these are, but for what was not observed."""
        jobs = arrivals.jobs
        block = (jobs["arrival"] // BLOCK).astype(int)
        gaps = [range(int(since // BLOCK), math.ceil(until / BLOCK)) for since, until in arrivals.unseen]
        for number in range(math.ceil(begin / BLOCK), int(end // BLOCK)):
            if not any(number in gap for gap in gaps):
                mine = jobs[block == number]
                names = zip(mine["model"].tolist(), mine["locality"].tolist(), strict=True)
                model, locality = arrivals.names["model"], arrivals.names["locality"]
                self._blocks[number] = Counter((model[m], locality[place]) for m, place in names)
        for number in [number for number in self._blocks if number < (end - COUNTS_KEPT) / BLOCK]:
            del self._blocks[number]

    def alike(self, until: float, span: float, played: float | None = None) -> Alike | None:
        """The `span` seconds that resemble the last ones before `until`, as `recalled`."""
        last = int(until // BLOCK)
        first = last
        while first - 1 in self._blocks:
            first -= 1
        blocks = [self._blocks[number] for number in range(first, last)]
        kinds = sorted(set().union(*blocks))
        counts = np.array([[block[kind] for block in blocks] for kind in kinds], np.float64)
        return _in_seconds(counts, span, first * BLOCK, played) if kinds else None


def followed(earlier: Arrivals, end: float, latest: Arrivals, recent: float) -> Arrivals:
    """Earlier arrivals, whose span has this `end`, moved to just before the `recent` ones, and those."""
    moved = earlier.jobs.copy()
    moved["arrival"] += recent - end
    now = latest.jobs[latest.jobs["arrival"] >= recent]
    return joined([replace(earlier, jobs=moved, unseen=()), replace(latest, jobs=now, unseen=())])
