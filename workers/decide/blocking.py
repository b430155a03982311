"""How long a job may wait for a batch of another model that it finds running. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from tasks.heartbeat import ANY, told_briefly

WINDOW = 60.0
"""Seconds in which batches count."""

RARE = 0.02
"""Share of the devices' time up to which other models' batches are ignored."""

QUANTILE = 0.9
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
        if began <= now - WINDOW:
            break
        taken[model].append(seconds)
    if not taken:
        return {}
    return {
        name: _blocking([s for model in taken if model != name for s in taken[model]], devices)
        for name in (*taken, ANY)
    }


def _blocking(others: list[float], devices: int) -> float:
    if sum(others) <= RARE * WINDOW * devices:
        return 0.0
    return told_briefly(float(np.quantile(others, QUANTILE)))
