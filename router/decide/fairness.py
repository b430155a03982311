"""What tenants and classes use now, the limits on it, and whose held job is released next. Pure.

Depths limit what waits, in jobs and bytes. Budgets limit what a tenant spends in a day. Fair shares order tenants while
queues are long. Held jobs are released by deadline within a tenant, and by weighted fair virtual time between tenants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from router.decide.classify import Allowance, Constraints
from tasks.models.profiles import Lengths, read_lengths
from tasks.topology import HardwareClass, Tenant, Topology
from taxiway.contract.keys import COUNT, WAITING, lengths_cell
from taxiway.errors import OverloadedError, RequestTooLargeError, TaxiwayError

RETRY_AFTER = 1.0
"""Seconds after which a refused request may be retried: several snapshots later."""

RELEASE_TICK = 0.02
"""Seconds between two ticks while jobs are held: queues are kept filled to their horizon, which may be short."""


@dataclass(slots=True)
class Depths:
    """Unfinished jobs, bound and held, by hardware class and by tenant.

    Only tenants with a bounded depth are counted, and the store refuses what several routers accept at once beyond it
    (forward.lua): this count spares it what is refused in any case. `used` is the share of its memory that the state
    store uses, 0 if unbounded. `refuses` is set while the store accepts no writes.
    """

    classes: dict[str, float] = field(default_factory=dict)
    tenants: dict[str, float] = field(default_factory=dict)
    underway: dict[str, str] = field(default_factory=dict)  # class by job: placed since then, and not forwarded yet
    used: float = 0.0
    refuses: bool = False

    def count(self, hardware_class: str, tenant: str) -> None:
        """Count a placement made since the snapshot."""
        self.classes[hardware_class] = self.classes.get(hardware_class, 0) + 1
        self.tenants[tenant] = self.tenants.get(tenant, 0) + 1


def depths_from(
    cells: Mapping[str, float], tenants: Mapping[str, float], used: float, *, refuses: bool = False
) -> Depths:
    """The depths of `tenants`, and those of classes as counted in the cells of `WORK`."""
    depths = Depths(tenants=dict(tenants), used=used, refuses=refuses)
    for cell, jobs in cells.items():
        place, _, kind = cell.rpartition("|")
        if kind == COUNT:
            hardware_class = place.rpartition("|")[0].removeprefix(f"{WAITING}|")
            depths.classes[hardware_class] = depths.classes.get(hardware_class, 0) + jobs
    return depths


def check_limits(whose: str, limits: Tenant | HardwareClass, *, size: int, depth: float) -> None:
    """Refuse a request of `size` bytes that exceeds the limits of a tenant or a class with `depth` unfinished jobs.

    Raises:
        RequestTooLargeError: larger than the `payload`.
        OverloadedError: there are `max_depth` unfinished jobs.
    """
    if limits.payload is not None and size > limits.payload:
        limit, message = f"{whose}.payload", f"payload: expected at most {limits.payload} bytes ({whose}.payload)"
        raise RequestTooLargeError(f"{message}, got {size}", limit=limit)
    if limits.max_depth is not None and depth >= limits.max_depth:
        raise _too_deep(whose, limits.max_depth, depth)


def over_depth(fields: Mapping[str, str]) -> OverloadedError:
    """Why the store refused a job with these fields of its record: its tenant had `max_depth` unfinished jobs."""
    most = int(fields["max_depth"])
    return _too_deep(f"tenants.{fields['tenant']}", most, most)


def is_crowded(error: TaxiwayError) -> bool:
    """Whether a `max_depth` refused a request: of the jobs that were counted, some may have ended since."""
    return isinstance(error, OverloadedError) and "limit" in error.details


def _too_deep(whose: str, most: int, depth: float) -> OverloadedError:
    limit = f"{whose}.max_depth"
    message = f"queue depth limit reached: {depth:.0f} unfinished jobs (limit {most}, {limit})"
    return OverloadedError(message, retry_after=RETRY_AFTER, limit=limit)


MEMORY = 10.0
"""Time constant, in seconds, of the decay of a tenant's usage: short bursts do not put a tenant over its share."""

_DAY = 86_400.0  # seconds
_SMOOTHING = 0.2  # exponential smoothing of the release interval
_FORGOTTEN = 1e-4  # share of the highest usage


def day_of(now: float) -> str:
    """The UTC date of `now`, by the store's clock."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


class Shares:
    """Virtual time of each recently active tenant: US dollars of device time bound for it, over its weight.

    A tenant above the mean is *over its fair share*: while queues are long, its requests are held (`capacity`), and all
    others bypass them. A tenant that is alone never is. Credit is limited to `CREDIT`; otherwise a tenant with low
    usage could fill the queues before it is over its fair share. Each router counts only what it binds itself, which is
    a fair sample of the fleet.
    """

    CREDIT = 0.02
    """The most that a tenant may be below the mean when it is charged, as a share of the mean."""

    MIN_WORK = 0.04
    """Seconds of work that keep a device busy between two releases from holding: two intervals' worth."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._weights = {name: tenant.weight for name, tenant in tenants.items()}
        self._usage: dict[str, float] = {}
        self._total = 0.0
        self._work_limit = self.MIN_WORK

    def record_interval(self, seconds: float) -> None:
        """Record the time since the last release from holding: the longer it is, the more work is bound."""
        self._work_limit += _SMOOTHING * (max(2 * seconds, self.MIN_WORK) - self._work_limit)

    def work_limit(self, tenant: str) -> float | None:
        """Seconds of work that may be bound ahead of a request of a tenant over its fair share; None for any other."""
        return self._work_limit if self.over_fair_share(tenant) else None

    def charge(self, tenant: str, dollars: float) -> None:
        """Count what is bound for a tenant."""
        before = self._usage.get(tenant, 0.0)
        least = (1 - self.CREDIT) * self._total / max(len(self._usage), 1)
        self._usage[tenant] = max(before, least) + dollars / self._weights.get(tenant, 1.0)
        self._total += self._usage[tenant] - before

    def decay(self, seconds: float) -> None:
        """Decay all usage by elapsed time; inactive tenants are forgotten."""
        kept, most = math.exp(-seconds / MEMORY), max(self._usage.values(), default=0.0)
        self._usage = {name: kept * had for name, had in self._usage.items() if had > _FORGOTTEN * most}
        self._total = sum(self._usage.values())

    def over_fair_share(self, tenant: str) -> bool:
        """Whether the tenant's usage is above the mean of the active tenants."""
        return self._usage.get(tenant, 0.0) * len(self._usage) > self._total * (1 + 1e-9)

    def bypasses_holding(self, tenant: str) -> bool:
        """Whether the tenant's requests bypass held jobs: others are active, and it is not over its fair share."""
        return len(self._usage) > (tenant in self._usage) and not self.over_fair_share(tenant)


@dataclass(slots=True)
class Tenants:
    """The store's facts about tenants at the last read; spending grows as this router places more."""

    stored: Mapping[str, bytes] = field(default_factory=dict)
    """Answer lengths by `keys.lengths_cell`."""
    day: str = ""
    spent: dict[str, float] = field(default_factory=dict)
    """US dollars that each tenant spent on that day."""
    shares: Shares = field(default_factory=lambda: Shares({}))
    """Each tenant's recent usage: it outlives the snapshot."""

    def lengths(self, model: str, tenant: str) -> Lengths:
        """Recent lengths of `model`'s answers to the tenant; empty if none are stored."""
        raw = self.stored.get(lengths_cell(model, tenant))
        return read_lengths(raw) if raw is not None else {}

    def allowance(self, tenant: str, topology: Topology, now: float) -> Allowance | None:
        """What the tenant may still spend today; None if unbounded."""
        most = topology.rules_of(tenant).usd_per_day
        if most is None:
            return None
        day = day_of(now)
        spent = self.spent.get(tenant, 0.0) if day == self.day else 0.0
        return Allowance(tenant, day, most, most - spent, _DAY - now % _DAY)

    def spend(self, allowance: Allowance, dollars: float) -> None:
        """Count the cost of a placement under the allowance."""
        if allowance.day == self.day:
            self.spent[allowance.tenant] = self.spent.get(allowance.tenant, 0.0) + dollars


class HeldKind(msgspec.Struct, frozen=True, array_like=True):
    """What the jobs of one holding queue have in common: tenant, model (`name:version`) and constraints.

    Their candidates are therefore the same.
    """

    tenant: str
    model: str
    constraints: Constraints

    @property
    def queue(self) -> str:
        """The holding queue's name."""
        return _encode(self).decode()


_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(HeldKind).decode


def kind_of(queue: str) -> HeldKind | None:
    """The kind that a holding queue's name encodes; None if another release wrote it."""
    try:
        return _decode(queue)
    except msgspec.MsgspecError:
        return None


@dataclass(frozen=True, slots=True)
class Releasable:
    """A holding queue that may be released from, and the kind of its jobs."""

    name: str
    due: float  # the deadline of its first job by the store's clock; above 1e10 without one
    level: int  # of its first job
    jobs: int
    kind: HeldKind


class FairOrder:
    """Virtual time by tenant: US dollars of device time over the tenant's weight.

    The tenant with the least is next. A tenant that appears or returns starts at the lowest virtual time present, so no
    tenant accumulates credit while it has nothing waiting.
    """

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._weights = {name: tenant.weight for name, tenant in tenants.items()}
        self._virtual_time: dict[str, float] = {}

    def set_present(self, tenants: Iterable[str]) -> None:
        """Set the tenants that have held jobs; all others are forgotten."""
        present = set(tenants)
        floor = min((spent for name, spent in self._virtual_time.items() if name in present), default=0.0)
        self._virtual_time = {name: self._virtual_time.get(name, floor) for name in present}

    def next(self, ready: Iterable[Releasable]) -> Releasable:
        """The next queue to release from: the earliest deadline of the tenant with the least virtual time."""
        return min(ready, key=lambda one: (self._virtual_time[one.kind.tenant], one.due, one.name))

    def charge(self, tenant: str, dollars: float) -> None:
        """Add the cost of a tenant's released jobs to its virtual time."""
        self._virtual_time[tenant] += dollars / self._weights.get(tenant, 1.0)
