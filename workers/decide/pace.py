"""A variant's batch times against its profile: pace, residual quantile and drift. Pure.

A guarantee is `predicted · pace · residual`. The pace corrects the profile's mean; the residual R_p bounds how far
single batches deviate from it, learned per priority level from the batches with jobs of that level.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from taxiway.contract.keys import LEVELS

QUANTILE = 0.95
"""Fraction of batches that end within `predicted · pace · residual`."""

DRIFT = 2**0.5
"""A pace this far from 1, either way, is drift: it uses half the slack of an unlearned guarantee (R = 2)."""

_WEIGHT = 0.1  # of the newest batch in the pace, once there are ten
_OUTLIER = 4.0  # times the current pace: cap of a single batch's effect on the pace
_KEEP = 0.99  # decay of the histogram per batch: about the last hundred count
_ENOUGH = 10  # batches before drift is reported
_STEP = 2 ** (1 / 8)  # width of a bin: a quantile is read to 9 %, upwards
_LOWEST = 1 / 4  # upper edge of the first bin, of observed over predicted · pace
_BINS = 49  # up to 16; slower batches count in the last bin

Histogram = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Track:
    """A variant's recent batches. `pace` is observed over predicted seconds, 1 before any; `batches` counts them all.

    `histograms` hold, for each level, the weight of each bin of observed over `predicted · pace`, its newest batch
    weighing 1.
    """

    pace: float = 1.0
    batches: int = 0
    histograms: tuple[Histogram, ...] = ()

    @property
    def residuals(self) -> tuple[float, ...]:
        """R_p by level: the upper edge of the bin that contains the quantile of observed over `predicted · pace`."""
        return tuple(_residual(histogram) for histogram in self.histograms)

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
    place = _place(residual)
    return Track(histograms=(tuple(1.0 if i == place else 0.0 for i in range(_BINS)),) * LEVELS)


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
    hit = _place(ratio / track.pace) if track.pace > 0 else 0
    histograms = tuple(_with(h, hit) if level in levels else h for level, h in enumerate(track.histograms))
    return replace(track, pace=max(pace, 1e-6), batches=batches, histograms=histograms)


def _with(histogram: Histogram, hit: int) -> Histogram:
    return tuple(_KEEP * weight + (place == hit) for place, weight in enumerate(histogram))


def _residual(histogram: Histogram) -> float:
    wanted = QUANTILE * math.fsum(histogram)
    seen = 0.0
    for place, weight in enumerate(histogram):
        seen += weight
        if seen >= wanted:
            return max(1.0, _LOWEST * _STEP**place)
    return _LOWEST * _STEP ** (_BINS - 1)


def _place(ratio: float) -> int:
    """The bin of a ratio: the first whose upper edge is not below it."""
    if ratio <= _LOWEST:
        return 0
    return min(_BINS - 1, math.ceil(math.log(ratio / _LOWEST) / math.log(_STEP) - 1e-9))
