"""Chooses the batches to time, and fits `max(floor, base + step·size + slope·rows·size)` to their times. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.models.model import Model, Profile
from tasks.models.profiles import Residuals
from workers.decide.endpoints import non_negative

SIZES = 4
"""Most sizes measured per model: of more buckets an even selection is taken."""


@dataclass(frozen=True, slots=True)
class RunBudget:
    """The budget of one variant: seconds for all runs, and the least and most runs of a batch."""

    budget: float
    fewest: int
    most: int


FULL_BUDGET = RunBudget(budget=60.0, fewest=3, most=25)
QUICK_BUDGET = RunBudget(budget=12.0, fewest=2, most=9)


def grid(model: Model, max_rows: int) -> list[tuple[int, int]]:
    """(rows, size) of the batches to time: corners first, so points that the budget does not cover lie between them."""
    rows = powers(max_rows)
    sizes = thinned(list(model.buckets), SIZES)
    points = [(r, s) for r in rows for s in sizes]
    corners = [(r, s) for r in (rows[0], rows[-1]) for s in (sizes[0], sizes[-1])]
    middle = sorted(set(points) - set(corners), key=lambda p: (p[0] * p[1], p))
    spread = middle[1::2] + middle[::2]
    return [*dict.fromkeys(corners), *spread]


def powers(largest: int) -> list[int]:
    """1, 2, 4, … and `largest`; of more than six only every second, and the last."""
    found = [2**i for i in range(largest.bit_length()) if 2**i < largest] + [largest]
    return found if len(found) <= 6 else [*found[:-1:2], largest]


def thinned(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def repeats(plan: RunBudget, seconds: float, left: float, points_left: int) -> int:
    """The number of runs of a batch of `seconds`, if `left` seconds remain for it and the points after it."""
    share = left / max(points_left, 1)
    return max(plan.fewest, min(plan.most, int(share / max(seconds, 1e-9))))


_BASE, _SLOPE, _STEP = 0, 1, 2  # columns of the design
_WORTH = 0.7
"""`step` is used if it reduces the mean error to this share or less: a curve of fewer terms extrapolates better."""

_ROUNDS = 6  # reweightings; the weights change little after four
_HUBER = 1.345
"""Multiple of the errors' scale above which a point has less weight (Huber 1964: 95 % efficient for normal errors)."""

_DIGITS = 4  # significant digits of a fitted figure


@dataclass(frozen=True, slots=True)
class Timed:
    """One point of the grid: rows, their mean size, and the seconds of each run, at least one."""

    rows: int
    size: float
    runs: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median run."""
        return float(np.median(self.runs))


def fit(points: Sequence[Timed]) -> Profile:
    """The curve of non-negative terms with the least relative errors; outliers have less weight.

    Args:
        points: at least one, of positive seconds.

    Every split of the points into those on the floor and the others is tried. n points have n splits, because the floor
    takes the fastest.
    """
    ordered = sorted(points, key=lambda p: (p.seconds, p.rows * p.size, p.rows))
    rows = np.array([p.rows for p in ordered], float)
    sizes = np.array([p.size for p in ordered], float)
    seconds = np.array([p.seconds for p in ordered], float)
    design = np.column_stack([np.ones(len(ordered)), rows * sizes, sizes])
    error, simple = _best_split(design, seconds, (_BASE, _SLOPE))
    error_with_step, full = _best_split(design, seconds, (_BASE, _SLOPE, _STEP))
    return full if error_with_step <= _WORTH * error - 1e-6 and len(ordered) > 3 else simple


def residuals(points: Sequence[Timed], curve: Profile) -> Residuals:
    """Quantiles of observed over predicted seconds of all runs, with equal weight for each point."""
    ratios, weights = [], []
    for point in points:
        predicted = curve.latency(point.rows, point.size)
        ratios += [seconds / predicted for seconds in point.runs]
        weights += [1 / len(point.runs)] * len(point.runs)
    order = np.argsort(ratios)
    share = np.cumsum(np.array(weights)[order]) / sum(weights)
    p50, p90, p95, p99 = (float(np.array(ratios)[order][_place(share, q)]) for q in (0.5, 0.9, 0.95, 0.99))
    return Residuals(p50=rounded(p50), p90=rounded(p90), p95=rounded(p95), p99=rounded(p99))


def rounded(value: float) -> float:
    """The value to four significant digits."""
    return float(f"{value:.{_DIGITS}g}")


def _place(share: np.ndarray, quantile: float) -> int:
    """The first index at which the cumulative share reaches the quantile."""
    return min(int(np.searchsorted(share, quantile - 1e-9)), len(share) - 1)


def _best_split(design: np.ndarray, seconds: np.ndarray, columns: tuple[int, ...]) -> tuple[float, Profile]:
    return min(_splits(design, seconds, columns), key=lambda split: split[0])


def _splits(design: np.ndarray, seconds: np.ndarray, columns: tuple[int, ...]) -> Iterator[tuple[float, Profile]]:
    """A curve for each number of fastest points on the floor, after its mean relative error over the medians."""
    for below in range(len(seconds)):
        floor = _robust(np.ones((below, 1)), seconds[:below])[0] if below else 0.0
        terms = np.zeros(3)
        terms[list(columns)] = _robust(design[below:, columns], seconds[below:])
        predicted = np.maximum(floor, design @ terms)
        if (predicted > 0).all():
            error = float(np.mean(np.abs(seconds / predicted - 1)))
            base, slope, step = (rounded(float(term)) for term in terms)
            yield error, Profile(base=base, slope=slope, step=step, floor=rounded(float(floor)))


def _robust(design: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative least squares on relative errors, reweighted by Huber's rule."""
    scaled = design / seconds[:, None]
    terms = non_negative(scaled.T @ scaled, scaled.sum(axis=0))
    for _ in range(_ROUNDS):
        errors = np.abs(scaled @ terms - 1)
        scale = max(1.4826 * float(np.median(errors)), 1e-9)
        weights = np.minimum(1.0, _HUBER * scale / np.maximum(errors, 1e-12))
        weighted = scaled * weights[:, None]
        terms = non_negative(weighted.T @ scaled, weighted.sum(axis=0))
    return terms
