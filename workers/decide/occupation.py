"""How long a device is busy: with rows of ended jobs, with batches of other models, and against a profile. Pure.

A batch of ONNX, torch or JAX cannot be interrupted. When its jobs are cancelled or expire, the fleet's work counters
drop them although the device is still busy, so its heartbeat reports the occupied time.

The pace corrects a profile's mean. A residual R_p bounds how far single batches deviate from `predicted · pace`, and
whole jobs from what their placement expected; it is learned per priority level.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from tasks.heartbeat import ANY, three_digits
from taxiway.contract.keys import LEVELS

LEAST_REMAINING = 1.0
"""Minimum remaining seconds assumed for a batch at its predicted end: one heartbeat, until the next check."""


@dataclass(frozen=True, slots=True)
class Occupation:
    """A running batch that cannot be interrupted: its start, on any clock, and its predicted seconds."""

    began: float
    predicted: float

    def ends_in(self, now: float) -> float:
        """Seconds until it ends; an overdue batch is assumed to need as long again as it is late."""
        return abs(self.predicted - (now - self.began))

    def longer_than(self, seconds: float, now: float) -> bool:
        """Whether it takes longer than `seconds`, by prediction or by now."""
        return max(self.predicted, now - self.began) > seconds

    def left(self, now: float, unwanted: float) -> float:
        """Remaining seconds attributed to the share `unwanted` of its rows.

        An overdue batch is assumed to need as long again as it is late.
        """
        return unwanted * max(abs(self.predicted - (now - self.began)), LEAST_REMAINING) if unwanted else 0.0


Job = TypeVar("Job", bound=Hashable)

Stint = tuple[Collection[Job], float]
"""A waiting batch: the jobs with rows in it, and its run time in seconds."""


def unfinished(stints: Iterable[Stint[Job]], left: float) -> set[Job]:
    """The jobs that do not end within `left` seconds if the batches run one after another in this order.

    A batch is skipped if it would end too late, or if all its jobs have rows in a skipped batch: later batches get its
    time.
    """
    late: set[Job] = set()
    spent = 0.0
    for jobs, seconds in stints:
        if late.issuperset(jobs):
            continue
        if spent + seconds > left:
            late.update(jobs)
        else:
            spent += seconds
    return late


BATCHES_COUNT = 60.0
"""Seconds in which batches count."""

RARE = 0.02
"""Share of the devices' time up to which other models' batches are ignored."""

BLOCKING_QUANTILE = 0.9
"""The share of other models' batches that end within the reported seconds.

Source: simulated fleets of several models, 900 s each; live attainment with this and without: 95.0 and 71.6 % on a
private edge, 96.8 and 95.5 % on a steady mix, 93.4 and 91.4 % with a class that turned three times slower.
"""

BATCHES = 4096
"""Batches that a device remembers."""


def blocking_by_model(newest: Iterable[tuple[float, str, float]], now: float, devices: int = 1) -> dict[str, float]:
    """Seconds that a job of each recent model may wait for another model's batch; under `ANY` those of all others.

    Args:
        newest: when each batch began, its model and its seconds, latest first.
        now: on the same clock.
        devices: how many devices ran them.
    """
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for began, model, seconds in newest:
        if began <= now - BATCHES_COUNT:
            break
        taken[model].append(seconds)
    if not taken:
        return {}
    return {
        name: _blocking([s for model in taken if model != name for s in taken[model]], devices)
        for name in (*taken, ANY)
    }


def _blocking(others: list[float], devices: int) -> float:
    if sum(others) <= RARE * BATCHES_COUNT * devices:
        return 0.0
    return three_digits(float(np.quantile(others, BLOCKING_QUANTILE)))


RESIDUAL_QUANTILE = 0.95
"""Fraction of batches that end within `predicted · pace · residual`."""

DRIFT = 2**0.5
"""A pace this far from 1, either way, is drift: it uses half the slack of an unlearned guarantee (R = 2)."""

_WEIGHT = 0.1  # of the newest batch in the pace, once there are ten
_OUTLIER = 4.0  # times the current pace: cap of a single batch's effect on the pace
_KEEP = 0.99  # decay of the histogram per batch: about the last hundred count
_ENOUGH = 10  # batches before drift is reported
_BIN_WIDTH = 2 ** (1 / 8)  # width of a bin: a quantile is read to 9 %, upwards
_LOWEST = 1 / 4  # upper edge of the first bin, of observed over predicted · pace
_BINS = 81  # up to 256, as what is expected in 0.1 ms may wait for 25; what is slower counts in the last bin

Histogram = tuple[float, ...]

Histograms = tuple[Histogram, ...]
"""By level, the weight of each bin of a ratio, its newest weighing 1."""


@dataclass(frozen=True, slots=True)
class Track:
    """A variant's recent batches. `pace` is observed over predicted seconds, 1 before any; `batches` counts them all.

    `histograms` are of observed over `predicted · pace`.
    """

    pace: float = 1.0
    batches: int = 0
    histograms: Histograms = ()

    @property
    def residuals(self) -> tuple[float, ...]:
        """R_p by level."""
        return residuals(self.histograms)

    @property
    def hedged(self) -> float:
        """The pace to expect of what has not run itself: a single batch or load may be an odd one."""
        return math.pow(self.pace, self.batches / (self.batches + 0.5))

    @property
    def surely(self) -> float:
        """The factor that makes a prediction safe for jobs of every level."""
        return self.pace * max(self.residuals, default=1.0)

    @property
    def drifted(self) -> bool:
        """Whether the profile no longer describes the device."""
        return self.batches >= _ENOUGH and not 1 / DRIFT <= self.pace <= DRIFT


def begin(residual: float = 2.0) -> Track:
    """The track of a variant that has not run: the residual of every level is the profile's.

    It counts as one batch, so a learned quantile replaces it after about twenty batches of a level.
    """
    return Track(histograms=unseen(residual))


def is_readable(track: Track) -> bool:
    """Whether this release wrote the track, or one with the same bins."""
    return all(len(histogram) == _BINS for histogram in track.histograms)


def unseen(residual: float) -> Histograms:
    """The histograms of every level before anything was seen."""
    place = _place(residual)
    return (tuple(1.0 if i == place else 0.0 for i in range(_BINS)),) * LEVELS


def seen(histograms: Histograms, ratio: float, levels: Collection[int]) -> Histograms:
    """The histograms after one more ratio, of these levels."""
    hit = _place(ratio)
    return tuple(_with(h, hit) if level in levels else h for level, h in enumerate(histograms))


def residuals(histograms: Histograms) -> tuple[float, ...]:
    """R_p by level: the upper edge of the bin that contains the quantile of the ratio, at least 1."""
    return tuple(_residual(histogram) for histogram in histograms)


def observe(track: Track, *, predicted: float, seconds: float, levels: Collection[int]) -> Track:
    """The track after one more batch, which had jobs of these levels.

    A prediction that is not positive is ignored.
    """
    if predicted <= 0:
        return track
    ratio = seconds / predicted
    batches = track.batches + 1
    counted = min(ratio, _OUTLIER * track.pace)
    pace = track.pace + max(_WEIGHT, 1 / batches) * (counted - track.pace)
    histograms = seen(track.histograms, ratio / track.pace if track.pace > 0 else 0.0, levels)
    return replace(track, pace=max(pace, 1e-6), batches=batches, histograms=histograms)


def wary(histograms: Histograms) -> tuple[float, ...]:
    """R_p by level, wider the less was seen: by a quarter after the first job, by a twentieth after twenty."""
    return tuple(_residual(one) * (1 + 1 / (2 + math.fsum(one))) for one in histograms)


def _with(histogram: Histogram, hit: int) -> Histogram:
    return tuple(_KEEP * weight + (place == hit) for place, weight in enumerate(histogram))


def _residual(histogram: Histogram) -> float:
    wanted = RESIDUAL_QUANTILE * math.fsum(histogram)
    seen = 0.0
    for place, weight in enumerate(histogram):
        seen += weight
        if seen >= wanted:
            return max(1.0, _LOWEST * _BIN_WIDTH**place)
    return _LOWEST * _BIN_WIDTH ** (_BINS - 1)


def _place(ratio: float) -> int:
    """The bin of a ratio: the first whose upper edge is not below it."""
    if ratio <= _LOWEST:
        return 0
    return min(_BINS - 1, math.ceil(math.log(ratio / _LOWEST) / math.log(_BIN_WIDTH) - 1e-9))
