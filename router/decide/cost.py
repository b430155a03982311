"""What each candidate would take: seconds until the answer, US dollars, and whether its queue has capacity.

Every figure is a column over the table's candidates, so a hundred candidates cost little more than one.

At most a `horizon` of work is bound to a queue; further requests are held. The queue of a tenant over its fair share
(`Shares`) is limited to what keeps devices busy until the next release. Other tenants then find a short queue, and
their requests bypass that tenant's held jobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from router.decide.candidates import CandidateTable, Column
from router.decide.classify import LATENCY_CRITICAL, Needs, Prefix
from router.decide.snapshot import FleetSnapshot
from tasks.heartbeat import dollars_per_hour
from tasks.topology import RUN_STRETCH, Topology

GAIN = 0.5
"""Step size of a shadow price per snapshot, relative to the deviation from the target utilisation."""

DEAREST = 4.0
"""Upper bound of a shadow price, as a multiple of the class's own price."""

Figure = TypeVar("Figure")


@dataclass(frozen=True, slots=True)
class Estimate(Generic[Figure]):
    """The figures of a request: one candidate's, or columns over all."""

    # Seconds, which add up to `finish`
    transfer: Figure
    wait: Figure
    load: Figure
    run: Figure
    work: Figure
    """Device seconds that are used."""
    cost: Figure
    """US dollars."""
    finish: Figure
    """Seconds until the answer is expected."""
    at_most: Figure
    """Seconds until the answer is there in all but a few cases."""
    saved: Figure
    """Seconds that `run` is less because a device has read a prefix of the prompt before."""

    def at(self: Estimate[Column], index: int) -> Estimate[float]:
        """The figures of one candidate."""
        return Estimate(*(float(getattr(self, name)[index]) for name in Estimate.__slots__))


EstimateColumns = Estimate[Column]


@dataclass(frozen=True, slots=True, eq=False)
class GroupNeeds:
    """The `Needs` of several requests: columns of shape (requests, 1), and `level` of shape (requests,)."""

    rows: int
    size: Column
    output: Column
    longest: Column
    payload: Column
    most_read: Column
    level: np.ndarray
    expected_batch: int = 0
    prefix: None = None


Workload = Needs | GroupNeeds
"""What is estimated: one request, or several."""


def estimate_figures(table: CandidateTable, needs: Workload, ahead: Column) -> EstimateColumns:
    """The candidates' figures for a request with `ahead` device seconds before it in each class.

    For several requests, the figures and `ahead` have one more leading axis.

    Time is estimated with the batches of the class's own traffic, cost with the batches that all of the model's traffic
    would form there. The fleet then finds the class where the model is cheapest as a whole, even if none of it runs
    there yet. A generated row costs its share of a full batch. The start of a device adds nothing to a request's cost:
    it serves all that runs there until the device is switched off. A prefix that was read before counts where nothing
    is ahead: only there the request prefers the device that has read it (`prefixes`).
    """
    (run, _), (work, work_if_all_came) = _run_and_work(table, needs)
    if table.billed is not None:
        work_if_all_came = work_in_full_batches(table, needs, table.billed)
    limits = None if table.allowed is None else limits_of(table.allowed, needs, work)
    wait = wait_of(table, ahead, limits) + table.blocked[needs.level] + table.blocking[needs.level]
    transfer = table.link_delay + table.link_seconds * needs.payload
    saved = np.zeros(wait.shape) if needs.prefix is None else _saved(table, needs, needs.prefix, wait)
    if needs.prefix is not None:
        run = np.maximum(run - saved, 0.0)
    finish = transfer + wait + table.load + run
    sharers = max(1.0, table.sharers / needs.rows)
    paid = work_if_all_came * (1.0 + table.spot_loss * run / 2) + table.loading / sharers
    if needs.prefix is not None:
        paid = np.maximum(paid - saved, 0.0)
    cost = table.dollars * paid + table.shadow * work_if_all_came + table.egress * needs.payload
    if table.metered is not None:
        cost = cost + metered_cost(table.metered, needs)
    at_most = (finish + table.beyond) * table.residual[needs.level]
    return Estimate(transfer, wait, table.load, run, work, cost, finish, at_most, saved)


def of_prompt(table: CandidateTable) -> tuple[Column, Column]:
    """Seconds that each token of a prompt takes each candidate, and what each row beside it adds to them."""
    if table.prompt is None:
        return table.step, table.slope
    return table.step + table.prompt[0], table.slope + table.prompt[1]


def _saved(table: CandidateTable, needs: Workload, prefix: Prefix, wait: Column) -> Column:
    """Seconds that reading the prefix would take, of candidates on its class that would start at once."""
    here = np.array([one.hardware_class == prefix.hardware_class for one in table.candidates])
    step, slope = of_prompt(table)
    saved: Column = np.where(here & (wait <= 0), read_before(needs, prefix) * (step + slope), 0.0)
    return saved


def read_before(needs: Workload, prefix: Prefix) -> float | Column:
    """Tokens of the prompt that a device has read before; the last one is always read again."""
    tokens: float | Column = np.clip(needs.size - needs.output - 1, 0, prefix.tokens)
    return tokens


def metered_cost(metered: np.ndarray, needs: Workload) -> Column:
    """US dollars for the rows and their expected tokens (`CandidateTable.metered`)."""
    each, of_input, of_output = metered
    cost: Column = needs.rows * (each + of_input * (needs.size - needs.output) + of_output * needs.output)
    return cost


def dearest(table: CandidateTable, needs: Workload, cost: Column) -> Column:
    """The most that a request of this expected cost may cost: on the class's dearest device, with the longest answers.

    Budgets hold for the longest answers and prompts where tokens are paid for; a longer answer elsewhere is device
    time, which they bound only as it is expected.
    """
    cost = cost * table.dearer
    if table.metered is None:
        return cost
    _, of_input, of_output = table.metered
    more_read = np.maximum(needs.most_read - (needs.size - needs.output), 0.0)
    more_written = np.maximum(needs.longest - needs.output, 0.0)
    most: Column = cost + needs.rows * (of_input * more_read + of_output * more_written)
    return most


Limits = tuple[np.ndarray, np.ndarray]
"""Seconds of waiting for a rate limit: for each device second ahead, and for the request itself, negative while more
is left than it needs. Two of each, for requests and tokens, before the axes of `EstimateColumns`."""


def limits_of(allowed: np.ndarray, needs: Workload, work: Column) -> Limits:
    """The rate limits as a request sees them that takes `work` device seconds; what is ahead is taken for alike."""
    a_second, left = allowed[:, 0], allowed[:, 1]
    size = np.maximum(needs.size, 1.0)
    takes = needs.rows * np.stack(np.broadcast_arrays(np.ones_like(size), size))
    takes, shape = (
        takes.reshape(takes.shape + (1,) * (work.ndim + 1 - takes.ndim)),
        (2,) + (1,) * (work.ndim - 1) + (-1,),
    )
    a_second, left = a_second.reshape(shape), left.reshape(shape)
    return takes / a_second / np.maximum(work, 1e-9), (takes - left) / a_second


def wait_of(table: CandidateTable, ahead: Column, limits: Limits | None = None) -> Column:
    """Seconds until each candidate's devices reach a request with `ahead` device seconds before it in each class."""
    before = ahead.take(table.queue, axis=-1)
    wait: Column = np.maximum(before / table.servers - table.concurrent, 0.0)
    if limits is not None:
        each, own = limits
        wait = np.maximum(wait, (each * before + own).max(axis=0))
    return wait


def alone_and_each(table: CandidateTable, needs: Workload) -> tuple[Column, Column]:
    """Seconds of a batch of no rows of the workload's size, and what each row adds."""
    alone: Column = table.base + table.step * needs.size
    each: Column = table.slope * needs.size
    if table.prompt is None:
        return alone, each
    read = needs.size - needs.output
    return alone + table.prompt[0] * read, each + table.prompt[1] * read


def work_in_full_batches(table: CandidateTable, needs: Workload, full: Column) -> Column:
    """Device seconds of the workload's rows, each with its share of a batch of `full` rows like it."""
    alone, each = alone_and_each(table, needs)
    work: Column = np.maximum(table.floor, alone + each * full) / full * needs.rows
    return work


def blocks_for(table: CandidateTable, needs: Workload) -> Column:
    """Seconds for which the workload's rows keep each candidate's device from other work.

    Batches that run as a whole keep it until they end. Those that rows join and leave take turns with other work, of
    which they take their share of a full batch.
    """
    if table.billed is None:
        return run_alone(table, needs)
    return work_in_full_batches(table, needs, table.billed)


def run_alone(table: CandidateTable, needs: Workload) -> Column:
    """Seconds that each candidate takes for the workload's rows alone."""
    alone, each = alone_and_each(table, needs)
    seconds: Column = np.maximum(table.floor, alone + each * np.minimum(float(needs.rows), table.limit))
    return seconds


def full_batch(table: CandidateTable, needs: Workload) -> Column:
    """Seconds that each candidate's largest batch of rows of the workload's size takes."""
    alone, each = alone_and_each(table, needs)
    seconds: Column = np.maximum(table.floor, alone + each * batch_limit(table, alone, each))
    return seconds


def batch_limit(table: CandidateTable, alone: Column, each: Column) -> Column:
    """The most rows that run together if a batch takes `alone + each · rows` seconds (`workers.decide.batcher.form`).

    `alone` and `each` have shape (candidates,) or (requests, candidates).
    """
    long = np.maximum(table.floor, alone + each * table.limit) > table.max_run
    if not any_true(long):
        return table.limit
    bound = np.maximum(table.max_run, RUN_STRETCH * np.maximum(table.floor, alone + each))
    rows = np.floor((bound - alone) / np.maximum(each, 1e-12))
    limit: Column = np.where(long, np.minimum(np.maximum(rows, 1.0), table.limit), table.limit)
    return limit


def _run_and_work(table: CandidateTable, needs: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Seconds until the rows have run, and their share of device seconds; one for each row of `table.rates`.

    Rows share a batch with those that arrive while the previous batch runs, `b = rate·L(b)` rows, or with the expected
    batch.
    """
    alone, each = alone_and_each(table, needs)
    rates = table.rates if each.ndim == 1 else table.rates[:, None]
    busy = rates * each
    limit = batch_limit(table, alone, each)
    together = np.where(busy < 1.0, rates * alone / np.maximum(1.0 - busy, 1e-9), limit)
    batch = np.minimum(np.maximum(together, max(needs.rows, needs.expected_batch)), limit)
    seconds = np.maximum(table.floor, alone + each * batch)
    shared = seconds * needs.rows / batch
    several = needs.rows > limit
    if not any_true(several):
        return seconds, shared
    full, rest = np.divmod(float(needs.rows), limit)
    last = np.where(rest > 0, np.maximum(table.floor, alone + each * rest), 0.0)
    if table.offered is not None:  # rows that run at another fleet follow each other
        last = np.where(table.offered, alone * rest / limit, last)
    many = full * np.maximum(table.floor, alone + each * limit) + last
    return np.where(several, many, seconds), np.where(several, many, shared)


def shadow_prices(topology: Topology, fleet: FleetSnapshot) -> Mapping[str, float]:
    """Each class's next shadow price in US dollars per device second.

    Raised above the class's target utilisation, lowered below it. A class without live devices has none. `fleet.shadow`
    holds the present prices.
    """
    prices: dict[str, float] = {}
    for name, hardware in topology.hardware.items():
        live = fleet.of_class(name)
        if live:
            used = sum(device.utilisation for device in live) / len(live)
            own = float(np.mean(dollars_per_hour(live, name, hardware))) / 3600
            step = GAIN * own * (used - hardware.target)
            prices[name] = min(max(fleet.shadow.get(name, 0.0) + step, 0.0), DEAREST * own)
    return prices


def horizon(table: CandidateTable, needs: Needs) -> Column:
    """The most seconds of work allowed ahead of the request in each candidate's queue.

    Beyond it the request is held. Unbounded for latency-critical requests, unless their tenant is over its fair share.
    """
    if needs.work_limit is not None:
        return _next_batch(table, needs.work_limit)
    if needs.deadline is not None and needs.deadline <= LATENCY_CRITICAL:
        unbounded = np.empty(len(table.candidates))
        unbounded.fill(math.inf)  # `np.full` takes four times as long
        return unbounded
    return table.horizon


def has_capacity(table: CandidateTable, level: int, work: np.ndarray, *, work_limit: float | None = None) -> bool:
    """Whether any live queue has capacity for a held request of this level.

    `table` and `work` are as in `choose`, `work_limit` as in `Needs`.
    """
    usual = _usual(table)
    limits = None if table.allowed is None else limits_of(table.allowed, usual, full_batch(table, usual) / table.limit)
    wait = wait_of(table, work[:, : level + 1].sum(axis=1), limits)
    most = table.horizon if work_limit is None else _next_batch(table, work_limit)
    return any_true(table.live & (wait <= most))


def any_true(which: np.ndarray) -> bool:
    """Whether a column of booleans has a true one, in a tenth of the time of `any`."""
    return bool(np.count_nonzero(which))


def _next_batch(table: CandidateTable, work_limit: float) -> Column:
    """Work that keeps each candidate's devices busy until the next release.

    That is `work_limit`, or one full batch if that takes longer.
    """
    least: Column = np.minimum(table.horizon, np.maximum(work_limit, full_batch(table, _usual(table))))
    return least


def _usual(table: CandidateTable) -> Needs:
    """A request of the model's expected size."""
    return Needs(deadline=None, level=0, rows=1, size=table.model.expected_size)
