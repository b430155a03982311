"""Which batches are timed, in which order, and when enough has been timed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.models.catalogue import Model

SIZES = 4
"""Sizes that are measured of a model: more buckets than these are thinned out evenly."""

LARGEST_GENERATION = 192
"""Tokens beyond which a generation is not measured: one batch would take the whole budget."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long one variant may take: seconds for all runs, and how often a batch is run at least and at most."""

    budget: float
    fewest: int
    most: int


FULL = Plan(budget=60.0, fewest=3, most=25)
QUICK = Plan(budget=12.0, fewest=2, most=9)


def grid(model: Model, max_rows: int) -> list[tuple[int, int]]:
    """(rows, size) of the batches to time: corners first, so that what a spent budget leaves out lies between them."""
    rows = powers(max_rows)
    sizes = thinned(_sizes(model), SIZES)
    points = [(r, s) for r in rows for s in sizes]
    corners = [(r, s) for r in (rows[0], rows[-1]) for s in (sizes[0], sizes[-1])]
    middle = sorted(set(points) - set(corners), key=lambda p: (p[0] * p[1], p))
    spread = middle[1::2] + middle[::2]
    return [*dict.fromkeys(corners), *spread]


def powers(largest: int) -> list[int]:
    """1, 2, 4, … and `largest` itself; of more than six, every second but the last."""
    found = [2**i for i in range(largest.bit_length()) if 2**i < largest] + [largest]
    return found if len(found) <= 6 else [*found[:-1:2], largest]


def thinned(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def repeats(plan: Plan, seconds: float, left: float, points_left: int) -> int:
    """How often a batch of these seconds is run when `left` seconds are left for it and the points after it."""
    share = left / max(points_left, 1)
    return max(plan.fewest, min(plan.most, int(share / max(seconds, 1e-9))))


def _sizes(model: Model) -> list[int]:
    if model.pipeline != "generation":
        return list(model.buckets)
    return [bucket for bucket in model.buckets if bucket <= LARGEST_GENERATION] or [model.buckets[0]]
