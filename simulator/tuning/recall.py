"""Which recorded arrivals a plan is made for: the latest ones, unless an earlier time was more like now. Pure.

Traffic comes back: nights, mornings, campaigns. Just after rates have changed, the last minutes are mostly of what is
over, and an earlier time at which requests came as they do now says more of what follows, its bursts included.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from router.decide.history import REFUSED, SLICE, Arrivals, joined
from simulator.traces import Trace

BLOCK = float(SLICE)
"""Seconds whose arrivals are counted together, and stay together where others are drawn: bursts last about as long."""

NOW = 4
"""Blocks that say how requests come now."""

SURE = 3.0
"""A model's rate has changed if it differs from what it was by this many standard errors."""

LEAST = 0.2
"""Rates that differ by less than this share are alike, however many requests show it."""

CLEARLY = 0.5
"""An earlier time is played if it differs from now by at most this share of what the latest differs, in squares."""

KEPT = 86400.0
"""Seconds for which counts are remembered: a day, as traffic comes back daily."""

Counts = NDArray[np.float64]
"""Requests by model and block, shape (models, blocks); the last block has just ended."""


def counts_of(trace: Trace, begin: float, end: float) -> Counts:
    """The requests of a trace by model and block, from `begin` to `end`."""
    edges = np.arange(begin, end + BLOCK / 2, BLOCK)
    models = range(len(trace.models))
    return np.array([np.histogram(trace.arrival[trace.model == model], edges)[0] for model in models], np.float64)


def recalled(counts: Counts, length: int) -> int | None:
    """The first of the `length` blocks that resemble the last `NOW` more than those just before do; None if none do."""
    if counts.shape[1] <= length + NOW:
        return None
    differ = _differences(counts, length)
    if differ[:, -1].max() <= SURE**2:
        return None
    total = differ.sum(axis=0)
    best = len(total) - 1 - int(np.argmin(total[::-1]))
    return best if total[best] <= CLEARLY * total[-1] else None


def _differences(counts: Counts, length: int) -> Counts:
    """By how many standard errors each stretch's rates differ from now, squared; shape (models, stretches).

    Requests come unevenly. How unevenly, the steps from block to block tell: unlike the variance, they do not grow with
    a change that lasts.
    """
    now = counts[:, -NOW:].mean(axis=1, keepdims=True)
    means = np.lib.stride_tricks.sliding_window_view(counts[:, :-NOW], length, axis=1).mean(axis=2)
    uneven = (np.diff(counts, axis=1) ** 2).mean(axis=1) / 2 / np.maximum(counts.mean(axis=1), 1 / BLOCK)
    rate = np.maximum((means * length + now * NOW) / (length + NOW), 1 / BLOCK)
    chance = rate * np.maximum(uneven, 1.0)[:, None] * (1 / length + 1 / NOW)
    differ: Counts = (means - now) ** 2 / (chance + (rate * LEAST / SURE) ** 2)
    return differ


class Traffic:
    """How many requests of each model and locality came in each block of the last `KEPT` seconds."""

    def __init__(self) -> None:
        self._blocks: dict[int, Counter[tuple[str, str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def add(self, arrivals: Arrivals, begin: float, end: float) -> None:
        """Count the whole blocks from `begin` to `end`, whose arrivals these are, but for what was not observed."""
        jobs = arrivals.jobs[arrivals.jobs["state"] != REFUSED]
        block = (jobs["arrival"] // BLOCK).astype(int)
        gaps = [range(int(since // BLOCK), math.ceil(until / BLOCK)) for since, until in arrivals.unseen]
        for number in range(math.ceil(begin / BLOCK), int(end // BLOCK)):
            if not any(number in gap for gap in gaps):
                mine = jobs[block == number]
                names = zip(mine["model"].tolist(), mine["locality"].tolist(), strict=True)
                model, locality = arrivals.names["model"], arrivals.names["locality"]
                self._blocks[number] = Counter((model[m], locality[place]) for m, place in names)
        for number in [number for number in self._blocks if number < (end - KEPT) / BLOCK]:
            del self._blocks[number]

    def begin_of(self, until: float, span: float) -> float | None:
        """When `span` seconds begin that resemble the last minutes before `until`; None for the latest ones."""
        last = int(until // BLOCK)
        first = last
        while first - 1 in self._blocks:
            first -= 1
        blocks = [self._blocks[number] for number in range(first, last)]
        kinds = sorted(set().union(*blocks))
        counts = np.array([[block[kind] for block in blocks] for kind in kinds], np.float64)
        found = recalled(counts, int(span // BLOCK)) if kinds else None
        return None if found is None else (first + found) * BLOCK


def followed(earlier: Arrivals, end: float, latest: Arrivals, until: float) -> Arrivals:
    """Earlier arrivals, whose span has this `end`, moved to just before the last minutes, and those."""
    recent = until - NOW * BLOCK
    moved = earlier.jobs.copy()
    moved["arrival"] += recent - end
    now = latest.jobs[latest.jobs["arrival"] >= recent]
    return joined([replace(earlier, jobs=moved, unseen=()), replace(latest, jobs=now, unseen=())])
