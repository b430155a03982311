"""Requests that cost alike: what may be treated as one divisible amount of work without overstating its cost.

All requests of a kind have the same model, service and classes that answer them in time. Each has a size, and takes at
least its size times the kind's rate on each class. A kind of requests whose costs have unlike ratios between classes
understates them, so the kinds that lose most are split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.traces.trace import Column
from simulator.traces.workload import Figures, Workload


@dataclass(frozen=True, slots=True)
class Kind:
    """`rows` are numbers of requests, `columns` of classes. Shapes: `size` (rows,), `rate` (columns,).

    `lost` is the US dollars by which the kind may understate its requests' costs.
    """

    service: int
    rows: Column
    columns: Column
    size: Figures
    rate: Figures
    lost: float
    ratios: Figures

    @classmethod
    def of(cls, service: int, rows: Column, work: Figures, price: Figures) -> Kind:
        """The kind of these requests; `work` is seconds, shape (n, classes), infinite alike for all of them."""
        columns = np.flatnonzero(np.isfinite(work[rows[0]]))
        own = np.maximum(work[np.ix_(rows, columns)], _NONE)
        rate = own.mean(axis=0)
        size = (own / rate).min(axis=1)
        lost = float((own * price[columns]).min(axis=1).sum()) * (1 - size.mean())
        logs = np.log(own)
        return cls(service, rows, columns, size, rate, lost, logs - logs.mean(axis=1, keepdims=True))

    def split(self, work: Figures, price: Figures) -> list[Kind]:
        """Two kinds, divided at the median of the most varied ratio; only this one if all ratios are alike."""
        ratio = self.ratios[:, self.ratios.var(axis=0).argmax()]
        middle = np.median(ratio)
        less = ratio < middle if middle > ratio.min() else ratio <= middle
        if less.all():
            return [self]
        return [Kind.of(self.service, self.rows[part], work, price) for part in (less, ~less)]


_NONE = 1e-9
"""Seconds that count as none, so that ratios are defined."""


def kinds(workload: Workload, work: Figures, price: Figures, *, most: int) -> list[Kind]:
    """All requests that some class answers in time, in at most `most` kinds, or as many as the least needs."""
    trace = workload.trace
    able = np.isfinite(work)
    rows = np.flatnonzero(able.any(axis=1))
    keys = np.stack([trace.model[rows], trace.service[rows], able[rows] @ (1 << np.arange(work.shape[1]))], axis=1)
    found = [
        Kind.of(int(key[1]), rows[(keys == key).all(axis=1)], work, price) for key in np.unique(keys, axis=0).tolist()
    ]
    while found and len(found) < most:
        worst = max(range(len(found)), key=lambda number: found[number].lost)
        parts = found[worst].split(work, price)
        if len(parts) == 1:
            break
        found[worst : worst + 1] = parts
    return found
