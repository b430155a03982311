"""What placement reads between two snapshots of the fleet: the snapshot, its candidate tables and work added since.

Requests with equal needs share placements, computed once and reused while the work ahead stays about the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from msgspec.structs import replace

from router.decide.basis import basis_text
from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Constraints, Needs
from router.decide.fairness import Depths, HeldKind, Tenants
from router.decide.placement import Placement, pick, tolerance, weigh
from router.decide.prefixes import Prefixes
from router.decide.snapshot import Backlog, FleetSnapshot, with_occupied
from tasks.heartbeat import three_digits
from tasks.models.model import Model, generates
from tasks.models.profiles import ProfileBook
from tasks.ticket import Promise, Ticket
from tasks.topology import Topology
from tasks.webhooks import HOOKS
from taxiway.contract.job import JobState
from taxiway.contract.keys import INFER, arrived_cell, held_cell, lengths_cell, open_key, spent_key, work_cell

_SHOWN_AT_MOST = 400  # characters of a placement in Flower's task details


class Template:
    """A placement with what all its jobs share: their ticket, their record's fields and the text shown in Flower.

    Each is made when it is first needed. `basis` is what the placement was decided from.
    """

    def __init__(self, placement: Placement, topology: Topology, tenant: str, basis: str) -> None:
        self.placement = placement
        self._topology = topology
        self._tenant = tenant
        self._basis = basis
        self._record: dict[str, str] = {}
        self._made_for = (-1.0, -1.0, "")
        self.follow(0.0)

    def follow(self, later: float) -> None:
        """Promise answers `later` than they were expected when the placement was weighed, in seconds."""
        finish, at_most = self.placement.bounds(later)
        self._bounds = three_digits(finish), three_digits(at_most)

    @property
    def queue(self) -> str:
        """The class queue that the jobs go to; empty if they are held."""
        return "" if self.placement.held else self.placement.candidate.hardware_class

    @cached_property
    def shown(self) -> str:
        """The placement and its reason, shown in place of a task's keyword arguments."""
        candidate = self.placement.candidate
        return shown(self._ticket.model, candidate.hardware_class, candidate.variant_name, self._ticket.reason)

    def ticket(self, job: str, reply: str, accepted: float, placed: float) -> Ticket:
        """The ticket to run `job`.

        Without a deadline it is valid for as long as the job's record is kept: until then, a second copy is recognised.
        """
        due = deadline_at(self.placement.needs, placed) or placed + self._topology.limits.keep_record
        promise = Promise(self.placement.candidate.hardware_class, placed, *self._bounds)
        return replace(self._ticket, job=job, reply=reply, accepted=accepted, deadline_at=due, promise=promise)

    def record(self, accepted: float, placed: float, hooks: str = "") -> Mapping[str, str]:
        """A job's record as stored: `job.JobRecord`, plus what scripts and explanations need, `hooks` among it.

        The same object for jobs with the same times and webhook endpoints, so that it is stored once.
        """
        if (accepted, placed, hooks) != self._made_for:
            due = repr(deadline_at(self.placement.needs, placed))
            at = "0.0" if self.placement.held else repr(placed)
            times = {"accepted": repr(accepted), "placed": at, "deadline_at": due}
            webhooks = {HOOKS: hooks} if hooks else {}
            self._record, self._made_for = {**self._fields, **times, **webhooks}, (accepted, placed, hooks)
        return self._record

    @cached_property
    def _ticket(self) -> Ticket:
        placement, hardware = self.placement, self._topology.hardware
        variants = placement.variants()
        return Ticket(
            job="",
            task=INFER,
            model=placement.table.model.id,
            variants=variants,
            prices={name: hardware[name].dollars_per_hour for name in variants},
            tariffs={name: tariff for name in variants if (tariff := hardware[name].price.tariff) is not None},
            runs=placement.runs,
            accepted=0.0,
            deadline_at=0.0,
            level=placement.level,
            reason=placement.reason,
            preemptible=placement.needs.constraints.preemptible,
        )

    @cached_property
    def _fields(self) -> Mapping[str, str]:
        return {
            "reason": self._ticket.reason,
            **_fields(self._ticket.model, self.placement, self._tenant, self._basis),
            **_open(self._topology, self._tenant),
        }


def deadline_at(needs: Needs, placed: float) -> float:
    """The deadline, by the same clock as `placed`; 0 if there is none."""
    return placed + needs.deadline if needs.deadline is not None else 0.0


def _fields(model: str, placement: Placement, tenant: str, basis: str) -> dict[str, str]:
    """Record fields of a job; a held one's work counts as held for the class that it would be bound to."""
    name, cell = placement.candidate.hardware_class, held_cell if placement.held else work_cell
    fields = {
        "state": JobState.HELD if placement.held else JobState.QUEUED,
        "model": model,
        "tenant": tenant,
        "level": str(placement.level),
        "cell": cell(name, placement.level),
        "work": repr(placement.work),
        "basis": basis,
    }
    if placement.held:
        return {**fields, "holding": HeldKind(tenant, model, placement.needs.constraints).queue}
    learning = {"lengths": lengths_cell(model, tenant)} if generates(placement.table.model) else {}
    return {
        **fields,
        "hardware_class": name,
        "variant": placement.candidate.variant_name,
        "arrived": arrived_cell(name, model),
        "rows": str(placement.needs.rows),
        **learning,
        **_spending(placement),
    }


def _spending(placement: Placement) -> dict[str, str]:
    """The most that the placement may cost and the key that counts it, for a tenant with a daily budget.

    Where tokens are paid for, the job's end replaces it with the bill.
    """
    allowance = placement.needs.allowance
    return {"spent": spent_key(allowance.day), "cost": repr(placement.dearest)} if allowance is not None else {}


def _open(topology: Topology, tenant: str) -> dict[str, str]:
    """Where the unfinished jobs of a tenant with a bounded depth are, and how many there may be."""
    most = topology.rules_of(tenant).max_depth
    return {} if most is None else {"open": open_key(tenant), "max_depth": str(most)}


def shown(model: str, hardware_class: str, variant: str, reason: str) -> str:
    """The job's placement and its reason, shown in place of a task's keyword arguments."""
    text = f"{model} on {hardware_class}/{variant}: {reason}"
    return text if len(text) <= _SHOWN_AT_MOST else text[: _SHOWN_AT_MOST - 1] + "…"


TOLERANCE = 0.001
"""Change of the work ahead, in device seconds, below which placements are always reused."""


@dataclass(slots=True, eq=False)
class _Kept:
    """The placements to pick from: how far the `backlog` that they were weighed with may change before they are not.

    `until` is the total change up to which it has surely not, and their promises are about right.
    """

    equals: Sequence[Placement]
    templates: Sequence[Template]
    tolerance: float
    backlog: np.ndarray
    until: float

    def pick(self, seed: int) -> Template:
        return self.templates[pick(self.equals, seed)]

    def follow(self, backlog: Backlog, changed: float) -> bool:
        """Whether they still hold for this backlog; what they promise follows it."""
        growth = backlog.seconds - self.backlog
        left = self.tolerance - float(np.abs(growth).sum())
        if left < 0:
            return False
        self.until = changed + min(left, TOLERANCE)
        for one in self.templates:
            one.follow(one.placement.delay(growth))
        return True


class WorkingSnapshot:
    """One snapshot with everything derived from it. Placements add to `backlog`, held jobs to `held`.

    `snapshot_name` is the name under which the snapshot is stored for explanations. The `prefixes`
    of prompts are known where they matter: while some class has several endpoints live.
    """

    def __init__(
        self,
        topology: Topology,
        book: ProfileBook,
        fleet: FleetSnapshot,
        snapshot_name: str = "",
        tenants: Tenants | None = None,
        depths: Depths | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.fleet = fleet
        self.depths = depths or Depths()
        self.tenants = tenants or Tenants()
        self.snapshot_name = snapshot_name
        classes = tuple(sorted(topology.hardware))
        self.backlog = Backlog(classes, {} if fleet.stale else fleet.work)
        self.held = Backlog(classes, {} if fleet.stale else fleet.held)
        self._devices = np.array([float(fleet.serving(name)) for name in self.backlog.classes])
        engines = np.array([topology.hardware[name].endpoint is not None for name in classes])
        several = np.array([len(fleet.of_class(name)) > 1 for name in classes])
        self.prefixes = prefixes if (engines & several).any() else None
        self._topology = topology
        self._book = book
        self._tables: dict[tuple[str, Constraints, tuple[str, str] | None], CandidateTable] = {}
        self._kept: dict[Hashable, _Kept] = {}
        self._changed = self._elapsed = 0.0

    def place(
        self, model: Model, needs: Needs, tenant: str, seed: int, *, key: Hashable = None, released: bool = False
    ) -> Template:
        """Where requests of the tenant with these needs run; kept under the `key`. Raises what `weigh` raises.

        Only `count` adds work.
        """
        ahead = self.ahead(released=released or self.tenants.shares.bypasses_holding(tenant))
        equals = weigh(self.table(model, needs.constraints), needs, ahead)
        basis = basis_text(needs, self.snapshot_name, equals[0].table.classes, ahead)
        templates = [Template(one, self._topology, tenant, basis) for one in equals]
        most = max(TOLERANCE, tolerance(equals))
        kept = _Kept(equals, templates, most, self.backlog.seconds.copy(), self._changed + TOLERANCE)
        if key is not None:
            self._kept[key] = kept
        return kept.pick(seed)

    def placed(self, key: Hashable, seed: int) -> Template | None:
        """The same from what is kept under the key, while the work ahead has changed by no more than its tolerance."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        if self._changed > kept.until and not kept.follow(self.backlog, self._changed):
            return None
        return kept.pick(seed)

    def ahead(self, *, released: bool = False) -> np.ndarray:
        """Device seconds served before a new request, bound and held, shape (classes, LEVELS).

        Only bound work is ahead of a request `released` from holding, or of one that bypasses it.
        """
        return self.backlog.seconds if released else self.backlog.seconds + self.held.seconds

    def table(self, model: Model, constraints: Constraints, place: tuple[str, str] | None = None) -> CandidateTable:
        """The model's candidates for all requests with these constraints; see `build_table` for the `place`."""
        key = (model.id, constraints, place)
        table = self._tables.get(key)
        if table is None:
            table = build_table(model, constraints, self._topology, self.fleet, self._book, place)
            self._tables[key] = table
        return table

    def rebuild(self, topology: Topology, book: ProfileBook) -> None:
        """Discard everything derived: endpoints, models or profiles changed."""
        self._topology, self._book = topology, book
        self._tables.clear()
        self._kept.clear()

    def advance(self, seconds: float) -> None:
        """Subtract the work that devices serve in `seconds`: the snapshot does not show progress made since."""
        self._elapsed += seconds
        self._note(self.backlog.serve(self._devices * seconds))

    def replace_work(self, work: Mapping[str, tuple[float, ...]], held: Mapping[str, tuple[float, ...]]) -> None:
        """Replace the work counted since the snapshot with newly read figures."""
        classes = self.backlog.classes
        occupied = {name: max(seconds - self._elapsed, 0.0) for name, seconds in self.fleet.occupied.items()}
        self.backlog, self.held = Backlog(classes, with_occupied(work, occupied)), Backlog(classes, held)
        self._kept.clear()

    def count(self, placement: Placement, tenant: str) -> None:
        """Count the work and cost of a tenant's placement that is on its way to its queue."""
        if not placement.needs.expected_batch:  # released jobs are already counted
            self.depths.count(placement.candidate.hardware_class, tenant)
        backlog, work = self.held if placement.held else self.backlog, placement.work
        backlog.add(placement.candidate.hardware_class, placement.level, work)
        if placement.held:
            return  # later requests are held too until a queue drains, so what is kept stays valid
        if placement.needs.allowance is not None:
            self.tenants.spend(placement.needs.allowance, placement.dearest)
        self.tenants.shares.charge(tenant, placement.device_dollars)
        self._note(work)

    def _note(self, seconds: float) -> None:
        """The backlog changed by this many device seconds."""
        self._changed += seconds
