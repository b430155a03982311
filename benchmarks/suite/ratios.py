"""Target ratios, each of figures of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = Mapping[tuple[str, str], Sequence[float]]
"""The figure of each round by contestant and measure."""

BATCH = 1000 * (0.005 + 32 * 0.0001)
"""Milliseconds of W1's full batch: workers/runtimes/echo.py."""

CELERIES = ("celery-prefork", "celery-threads")
SERVERS = ("litserve", "mosec", "ray", "bentoml")


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of one contestant's measure to the best of others, or to a constant, with its target.

    Attributes:
        against: contestants; none if there is a `constant`.
        at_least: whether the target is a minimum and the best is the largest; otherwise the reverse.
    """

    contestant: str
    measure: str
    target: float
    at_least: bool = True
    against: tuple[str, ...] = ()
    constant: float = 0.0
    of: str = ""

    @property
    def question(self) -> str:
        """The ratio's description."""
        return f"ratio of {self.contestant} {self.measure} to {self.of or ' or '.join(self.against)}"

    def rounds(self, figures: Figures) -> list[float]:
        """The ratio in each round; empty if one side was not measured."""
        own = figures.get((self.contestant, self.measure), ())
        others = [figures[name, self.measure] for name in self.against if (name, self.measure) in figures]
        best = max if self.at_least else min
        against = [best(each) for each in zip(*others, strict=False)] if self.against else [self.constant] * len(own)
        return [mine / theirs for mine, theirs in zip(own, against, strict=False)]

    def holds(self, rounds: Sequence[float]) -> bool:
        """Whether the median meets the target."""
        median = statistics.median(rounds)
        return median >= self.target if self.at_least else median <= self.target


def _to_limit(target: float) -> list[Ratio]:
    return [
        Ratio(name, "saturated", target, against=("limit",), of="the limit") for name in ("taxiway", "taxiway-http")
    ]


def _to_servers() -> list[Ratio]:
    return [
        ratio
        for server in SERVERS
        for ratio in (
            Ratio("taxiway-http", "saturated", 1.0, against=(server,)),
            Ratio("taxiway-http", "idle p50", 1.0, at_least=False, against=(server,)),
        )
    ]


RATIOS: Mapping[str, Sequence[Ratio]] = {
    "W0": [
        Ratio("taxiway", "saturated", 15.0, against=CELERIES, of="the better plain Celery pool"),
        Ratio("taxiway", "idle p50", 0.6, at_least=False, against=CELERIES, of="plain Celery's delay().get()"),
        Ratio("taxiway-http", "idle p50", 0.65, at_least=False, against=CELERIES, of="plain Celery's delay().get()"),
        *_to_servers(),
    ],
    "W1": [
        *_to_limit(0.97),
        Ratio("taxiway", "half load p99", 2.5, at_least=False, constant=BATCH, of="the time of a full batch"),
        *_to_servers(),
    ],
    "W2": [*_to_limit(0.95), *_to_servers()],
    "W3": _to_limit(0.95),
}
"""By workload."""
