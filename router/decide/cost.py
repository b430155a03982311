"""What each candidate would take: seconds until the answer, and US dollars (DESIGN §7).

Every figure is a column over the table's candidates, so that a hundred cost little more than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from router.decide.candidates import CandidateTable, Column
from router.decide.snapshot import FleetSnapshot
from tasks.topology import RUN_STRETCH, Topology

GAIN = 0.5
"""How far one reading moves a shadow price towards what utilisation asks for."""

DEAREST = 4.0
"""The most that a shadow price may be, as a multiple of the class's own price."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One candidate's figures: seconds for each part, device seconds used up, US dollars."""

    transfer: float
    wait: float
    load: float
    run: float
    work: float
    cost: float
    finish: float
    guaranteed: float


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """`Estimate`, as columns."""

    transfer: Column
    wait: Column
    load: Column
    run: Column
    work: Column
    cost: Column
    finish: Column
    guaranteed: Column

    def at(self, index: int) -> Estimate:
        """The figures of one candidate."""
        return Estimate(*(float(getattr(self, name)[index]) for name in Estimate.__slots__))


class Asked(Protocol):
    """What is reckoned for: the `Needs` of one request, or of several with columns of shape (requests, 1)."""

    @property
    def rows(self) -> int:
        """Rows of each request."""

    @property
    def company(self) -> int:
        """Jobs that are released with it."""

    @property
    def size(self) -> float | Column:
        """Of one row, in the model's unit."""

    @property
    def payload(self) -> float | Column:
        """Bytes that travel."""

    @property
    def level(self) -> int | np.ndarray:
        """Queue levels; of several requests an array of shape (requests,)."""


def reckon(table: CandidateTable, needs: Asked, ahead: Column) -> Figures:
    """The candidates' figures for a request, with `ahead` device seconds before it in each class.

    For several requests, figures and `ahead` have an axis more in front.

    Time is reckoned with the batches that the class's own traffic makes, cost with those that all of the model's would:
    the fleet is to find the class where the model is cheapest as a whole, also when nothing of it is there yet.
    """
    (run, _), (work, work_if_all_came) = _run_and_work(table, needs)
    wait = wait_of(table, ahead) + table.blocked[needs.level]
    transfer = table.link_delay + table.link_seconds * needs.payload
    finish = transfer + wait + table.load + run
    sharers = max(1.0, table.sharers / needs.rows)
    paid = work_if_all_came * (1.0 + table.spot_loss * run / 2) + table.load / sharers
    cost = table.dollars * paid + table.shadow * work_if_all_came + table.egress * needs.payload
    return Figures(transfer, wait, table.load, run, work, cost, finish, finish * table.residual[needs.level])


def wait_of(table: CandidateTable, ahead: Column) -> Column:
    """Seconds until each candidate's devices come to a request, with `ahead` device seconds before it in each class."""
    wait: Column = np.maximum(ahead[..., table.queue] / table.servers - table.beside, 0.0)
    return wait


def full_batch(table: CandidateTable, size: float) -> Column:
    """Seconds that each candidate's largest batch takes, of rows of this size."""
    alone, each = table.base + table.step * size, table.slope * size
    seconds: Column = np.maximum(table.floor, alone + each * batch_limit(table, alone, each))
    return seconds


def batch_limit(table: CandidateTable, alone: Column, each: Column) -> Column:
    """Most rows that run together, where a batch takes `alone + each · rows` seconds (`workers.decide.batcher.fill`).

    `alone` and `each` have shape (candidates,), or (requests, candidates).
    """
    long = np.maximum(table.floor, alone + each * table.limit) > table.max_run
    if not long.any():
        return table.limit
    bound = np.maximum(table.max_run, RUN_STRETCH * np.maximum(table.floor, alone + each))
    rows = np.floor((bound - alone) / np.maximum(each, 1e-12))
    limit: Column = np.where(long, np.minimum(np.maximum(rows, 1.0), table.limit), table.limit)
    return limit


def _run_and_work(table: CandidateTable, needs: Asked) -> tuple[np.ndarray, np.ndarray]:
    """Seconds until the rows have run, and the device seconds that are theirs; one for each row of `table.rates`.

    Rows share a batch with those that arrive while the one before it runs, `b = rate·L(b)` rows, or with their company.
    """
    alone, each = table.base + table.step * needs.size, table.slope * needs.size
    rates = table.rates if each.ndim == 1 else table.rates[:, None]
    busy = rates * each
    limit = batch_limit(table, alone, each)
    crowd = np.where(busy < 1.0, rates * alone / np.maximum(1.0 - busy, 1e-9), limit)
    batch = np.minimum(np.maximum(crowd, max(needs.rows, needs.company)), limit)
    seconds = np.maximum(table.floor, alone + each * batch)
    shared = seconds * needs.rows / batch
    several = needs.rows > limit
    if not several.any():
        return seconds, shared
    full, rest = np.divmod(float(needs.rows), limit)
    last = np.where(rest > 0, np.maximum(table.floor, alone + each * rest), 0.0)
    many = full * np.maximum(table.floor, alone + each * limit) + last
    return np.where(several, many, seconds), np.where(several, many, shared)


def shadow_prices(topology: Topology, fleet: FleetSnapshot) -> Mapping[str, float]:
    """Each class's next shadow price in US dollars a device second: raised above its target, lowered below it.

    A class without live devices has none. `fleet.shadow` holds the present prices.
    """
    prices: dict[str, float] = {}
    for name, hardware in topology.hardware.items():
        live = fleet.of_class(name)
        if live:
            used = sum(device.utilisation for device in live) / len(live)
            step = GAIN * hardware.dollars_per_second * (used - hardware.target)
            prices[name] = min(max(fleet.shadow.get(name, 0.0) + step, 0.0), DEAREST * hardware.dollars_per_second)
    return prices
