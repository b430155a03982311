"""Queue depth limits, in jobs and bytes: how much is waiting, and which requests are refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tasks.topology import Topology
from taxiway.contract.keys import COUNT, WAITING, tenant_cell
from taxiway.errors import BrokerFullError, OverloadedError, RequestTooLargeError

RETRY_AFTER = 1.0
"""Seconds after which a refused request may be retried: several snapshots later."""

_TENANT = tenant_cell("")


@dataclass(slots=True)
class Depths:
    """Unfinished jobs, bound and held, by hardware class and by tenant.

    Only tenants with a bounded depth are counted. `used` is the share of its memory that the state store uses, 0 if
    unbounded. `refuses` is set while the store accepts no writes.
    """

    classes: dict[str, float] = field(default_factory=dict)
    tenants: dict[str, float] = field(default_factory=dict)
    used: float = 0.0
    refuses: bool = False

    def count(self, hardware_class: str, tenant: str) -> None:
        """Count a placement made since the snapshot."""
        self.classes[hardware_class] = self.classes.get(hardware_class, 0) + 1
        self.tenants[tenant] = self.tenants.get(tenant, 0) + 1


def depths_from(cells: Mapping[str, float], used: float, *, refuses: bool = False) -> Depths:
    """The depths counted in the cells of `WORK`."""
    depths = Depths(used=used, refuses=refuses)
    for cell, jobs in cells.items():
        place, _, kind = cell.rpartition("|")
        if kind == COUNT:
            hardware_class = place.rpartition("|")[0].removeprefix(f"{WAITING}|")
            depths.classes[hardware_class] = depths.classes.get(hardware_class, 0) + jobs
        elif cell.endswith(_TENANT):
            depths.tenants[cell.removesuffix(_TENANT)] = jobs
    return depths


def check_store(depths: Depths, topology: Topology) -> None:
    """Refuse every request while the state store is nearly full or accepts no writes.

    Raises:
        BrokerFullError: the store cannot write to its disk, or uses more than `limits.memory` of its memory limit.
    """
    if depths.refuses:
        message = "the state store cannot write to its disk and accepts no requests: free disk space"
        raise BrokerFullError(message, retry_after=RETRY_AFTER)
    if depths.used > topology.limits.memory:
        message = f"the state store uses {depths.used:.0%} of its memory, more than limits.memory allows"
        raise BrokerFullError(message, retry_after=RETRY_AFTER, used=depths.used)


def check_tenant(depths: Depths, topology: Topology, *, tenant: str, size: int) -> None:
    """Refuse a request of `size` bytes if it exceeds its tenant's limits.

    Raises:
        RequestTooLargeError: larger than the tenant's `payload`.
        OverloadedError: the tenant has `max_depth` unfinished jobs.
    """
    rules = topology.tenants.get(tenant)
    if rules is not None:
        _check(f"tenants.{tenant}", rules.payload, rules.max_depth, size=size, depth=depths.tenants.get(tenant, 0))


def check_class(depths: Depths, topology: Topology, *, hardware_class: str, size: int) -> None:
    """Refuse a request of `size` bytes if it exceeds the class's limits. Raises as `check_tenant` does."""
    hardware = topology.hardware[hardware_class]
    depth = depths.classes.get(hardware_class, 0)
    _check(f"hardware.{hardware_class}", hardware.payload, hardware.max_depth, size=size, depth=depth)


def _check(whose: str, payload: int | None, most: int | None, *, size: int, depth: float) -> None:
    if payload is not None and size > payload:
        limit = f"{whose}.payload"
        raise RequestTooLargeError(f"payload: expected at most {payload} bytes ({limit}), got {size}", limit=limit)
    if most is not None and depth >= most:
        limit = f"{whose}.max_depth"
        message = f"queue depth limit reached: {depth:.0f} unfinished jobs (limit {most}, {limit})"
        raise OverloadedError(message, retry_after=RETRY_AFTER, limit=limit)
