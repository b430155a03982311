"""What placement reads between two snapshots of the fleet: the snapshot, its candidate tables and work added since."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import numpy as np

from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Constraints, Needs
from router.decide.depths import Depths
from router.decide.placement import Placement, weigh
from router.decide.placement_cache import CachedChoice
from router.decide.snapshot import Backlog, FleetSnapshot, with_occupied
from router.decide.tenants import Tenants
from tasks.models.catalogue import Model
from tasks.models.profiles import ProfileBook
from tasks.topology import Topology

TOLERANCE = 0.001
"""Change of the work ahead, in device seconds, below which a choice is always reused."""


class WorkingSnapshot:
    """One snapshot with everything derived from it. Placements add to `backlog`, held jobs to `held`.

    `snapshot_name` is the name under which the snapshot is stored for explanations.
    """

    def __init__(
        self,
        topology: Topology,
        book: ProfileBook,
        fleet: FleetSnapshot,
        snapshot_name: str = "",
        tenants: Tenants | None = None,
        depths: Depths | None = None,
    ) -> None:
        self.fleet = fleet
        self.depths = depths or Depths()
        self.tenants = tenants or Tenants()
        self.snapshot_name = snapshot_name
        classes = tuple(sorted(topology.hardware))
        self.backlog = Backlog(classes, {} if fleet.stale else fleet.work)
        self.held = Backlog(classes, {} if fleet.stale else fleet.held)
        self._devices = np.array([float(len(fleet.of_class(name))) for name in self.backlog.classes])
        self._topology = topology
        self._book = book
        self._tables: dict[tuple[str, Constraints], CandidateTable] = {}
        self._cached: dict[Hashable, tuple[float, CachedChoice]] = {}
        self._changed = self._elapsed = 0.0

    def make_choice(self, model: Model, needs: Needs, tenant: str, *, released: bool = False) -> CachedChoice:
        """The choice for requests with these needs. Raises what `weigh` raises. Only `count` adds work."""
        ahead = self.ahead(released=released or self.bypasses_holding(tenant))
        choice = weigh(self.table(model, needs.constraints), needs, ahead)
        return CachedChoice.of(choice, self._topology, tenant, self.snapshot_name, ahead)

    def cached(self, key: Hashable) -> CachedChoice | None:
        """The choice cached under this key, while the work ahead has changed by no more than its tolerance."""
        until, cached = self._cached.get(key, (-math.inf, None))
        return cached if self._changed <= until else None

    def keep(self, key: Hashable, cached: CachedChoice) -> None:
        """Cache the choice under this key."""
        self._cached[key] = self._changed + max(TOLERANCE, cached.choice.tolerance), cached

    def ahead(self, *, released: bool = False) -> np.ndarray:
        """Device seconds served before a new request, bound and held, shape (classes, LEVELS).

        Only bound work is ahead of a request `released` from holding, or of one that bypasses it.
        """
        return self.backlog.seconds if released else self.backlog.seconds + self.held.seconds

    def bypasses_holding(self, tenant: str) -> bool:
        """Whether the tenant's requests bypass the held jobs of other tenants."""
        return self.tenants.shares.bypasses_holding(tenant)

    def table(self, model: Model, constraints: Constraints) -> CandidateTable:
        """The model's candidates for all requests with these constraints."""
        key = (model.id, constraints)
        table = self._tables.get(key)
        if table is None:
            table = build_table(model, constraints, self._topology, self.fleet, self._book)
            self._tables[key] = table
        return table

    def rebuild(self, book: ProfileBook) -> None:
        """Discard everything derived: models or profiles changed."""
        self._book = book
        self._tables.clear()
        self._cached.clear()

    def advance(self, seconds: float) -> None:
        """Subtract the work that devices serve in `seconds`: the snapshot does not show progress made since."""
        self._elapsed += seconds
        self._note(self.backlog.serve(self._devices * seconds))

    def replace_work(self, work: Mapping[str, tuple[float, ...]], held: Mapping[str, tuple[float, ...]]) -> None:
        """Replace the work counted since the snapshot with newly read figures."""
        classes = self.backlog.classes
        occupied = {name: max(seconds - self._elapsed, 0.0) for name, seconds in self.fleet.occupied.items()}
        self.backlog, self.held = Backlog(classes, with_occupied(work, occupied)), Backlog(classes, held)
        self._cached.clear()

    def count(self, placement: Placement, tenant: str) -> None:
        """Count the work and cost of a tenant's placement that is on its way to its queue."""
        if not placement.needs.company:  # released jobs are already counted
            self.depths.count(placement.candidate.hardware_class, tenant)
        backlog, work = self.held if placement.held else self.backlog, placement.work
        backlog.add(placement.candidate.hardware_class, placement.level, work)
        if placement.held:
            return  # later requests are held too until a queue drains, so cached choices stay valid
        if placement.needs.allowance is not None:
            self.tenants.spend(placement.needs.allowance, placement.cost)
        self.tenants.shares.charge(tenant, placement.device_dollars)
        self._note(work)

    def _note(self, seconds: float) -> None:
        """The backlog changed by this many device seconds."""
        self._changed += seconds
