"""Why a request is placed where it is: the candidate table, from a placement's basis or from the fleet now. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from router.decide.basis import Basis
from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Needs
from router.decide.cost import dearest, horizon
from router.decide.placement import choose, reserved_and_busy, route_by_plan, seed_of, weighed_for
from router.decide.snapshot import Backlog, FleetSnapshot
from router.decide.working_snapshot import WorkingSnapshot
from router.service.admission import Order, Rules, understood
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook
from tasks.topology import Topology
from taxiway.errors import TaxiwayError

_decode_fleet = msgspec.json.Decoder(FleetSnapshot).decode


class Considered(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate's figures in the choice, for the whole request."""

    hardware_class: str
    variant: str
    chosen: bool
    why_not: str | None
    """None for the chosen candidate."""
    # Seconds: `finish` is the sum of the next four
    finish: float
    transfer: float
    wait: float
    load: float
    run: float
    saved: float
    """What `run` is less because some device has read a prefix of the prompt."""
    at_most: float
    # US dollars
    cost: float
    warm: bool
    warning: str | None
    """A weak profile's description."""


_SECONDS = ("finish", "transfer", "wait", "load", "run", "saved", "at_most")


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A choice, or why there is none."""

    # None while the request is held, and if it failed at once
    hardware_class: str | None = None
    variant: str | None = None
    level: int
    reason: str
    held: bool = False
    error: str | None = None
    """The error's code (`taxiway.errors`), if it failed at once; `reason` is its message."""
    considered: tuple[Considered, ...]
    """Cheapest first."""
    refused: tuple[Mapping[str, str], ...]
    """The `hardware_class` and `variant` of each that could not run the request, and the `reason`."""


def preview(order: Order, rules: Rules, working: WorkingSnapshot) -> tuple[Model, Explanation]:
    """The model, and what `admit` would decide now with all figures; nothing is placed.

    Raises:
        TaxiwayError: as `needs_of` raises it, or because the model is unknown.
    """
    model, needs = understood(order, rules, working)
    table = working.table(model, needs.constraints)
    ahead = working.ahead(released=working.tenants.shares.bypasses_holding(order.request.tenant))
    return model, explain(table, needs, ahead, seed=seed_of(order.job))


def unpack_snapshot(raw: bytes) -> FleetSnapshot | None:
    """The snapshot in `raw`; None if an incompatible release wrote it."""
    try:
        return _decode_fleet(zlib.decompress(raw))
    except (zlib.error, msgspec.MsgspecError):
        return None


def explain_record(
    model: Model, basis: Basis, topology: Topology, fleet: FleetSnapshot, book: ProfileBook, *, seed: int
) -> Explanation:
    """The table of an earlier placement, recomputed from its basis and the snapshot that the basis names."""
    table = build_table(model, basis.needs.constraints, topology, fleet, book)
    return explain(table, basis.needs, Backlog(table.classes, basis.work).seconds, seed=seed)


def explain(table: CandidateTable, needs: Needs, work: np.ndarray, *, seed: int) -> Explanation:
    """What `choose` decides from these arguments, with every candidate's figures."""
    chosen: int | None = None
    outcome: dict[str, Any]
    try:
        placement = choose(table, needs, work, seed=seed)
        chosen = None if placement.held else placement.index
        outcome = {"reason": placement.reason, "held": placement.held}
    except TaxiwayError as error:
        outcome = {"reason": error.message, "error": error.code}
    if chosen is not None:
        candidate = table.candidates[chosen]
        outcome |= {"hardware_class": candidate.hardware_class, "variant": candidate.variant_name}
    rows = _Rows(table, needs, work, chosen)
    return Explanation(level=needs.level, considered=rows.considered(), refused=rows.refused(), **outcome)


class _Rows:
    """The table's candidates compared with the chosen one; `chosen` is None if none could be chosen."""

    def __init__(self, table: CandidateTable, needs: Needs, work: np.ndarray, chosen: int | None) -> None:
        weighed = weighed_for(table, needs, work)
        self._table = table
        self._needs = needs
        self._chosen = chosen
        self._figures = weighed.figures
        self._reserved_and_busy = reserved_and_busy(table, work)
        self._dearest = dearest(table, needs, self._figures.cost)
        self._planned = route_by_plan(weighed).among
        self._most = horizon(table, needs)
        self._within_horizon = weighed.within_horizon

    def considered(self) -> tuple[Considered, ...]:
        """Every candidate with a live device, cheapest first."""
        figures = self._figures
        live = np.flatnonzero(self._table.live).tolist()
        return tuple(self._row(i) for i in sorted(live, key=lambda i: (figures.cost[i], figures.finish[i], i)))

    def refused(self) -> tuple[Mapping[str, str], ...]:
        """Every other class and variant, with its reason."""
        table = self._table
        absent = [table.candidates[i] for i in np.flatnonzero(~table.live).tolist()]
        why = [(one.hardware_class, one.variant, one.reason) for one in table.refusals]
        why += [(c.hardware_class, c.variant_name, c.absent or "no device of the class is live") for c in absent]
        return tuple(dict(zip(("hardware_class", "variant", "reason"), one, strict=True)) for one in why)

    def _row(self, index: int) -> Considered:
        table, at = self._table, self._figures.at(index)
        return Considered(
            hardware_class=table.candidates[index].hardware_class,
            variant=table.candidates[index].variant_name,
            chosen=index == self._chosen,
            why_not=None if index == self._chosen else self._why_not(index),
            **{name: round(getattr(at, name), 6) for name in _SECONDS},
            cost=float(f"{at.cost:.4g}"),
            warm=bool(table.warm[index] > 0),
            warning=table.warnings[index],
        )

    def _why_not(self, index: int) -> str:
        cost, most = self._dearest[index], self._needs.affordable
        if cost > most:
            return f"over budget: {cost:.3g} USD, limit {max(most, 0.0):.3g}"
        if self._reserved_and_busy[index]:
            return f"reserved for {self._table.candidates[index].hardware.reserve_for}, and the class is busy"
        if self._planned is not None and not self._planned[index]:
            return f"not planned: {self._why_not_planned(index)}"
        if self._chosen is None or self._sure(self._chosen):
            return self._lateness(index) or self._over_horizon(index) or self._compare(index, self._chosen)
        finish = self._figures.finish
        if finish[index] > finish[self._chosen]:
            return f"later: expected in {finish[index]:.3g} s"
        return self._over_horizon(index) or self._compare(index, self._chosen)

    def _why_not_planned(self, index: int) -> str:
        guide = self._table.guide
        assert guide is not None
        if guide.preferred[index]:
            return f"would be late: expected in {self._figures.finish[index]:.3g} s"
        return f"the plan prefers {guide.hardware_class}"

    def _sure(self, index: int) -> bool:
        deadline = self._needs.deadline
        return deadline is None or bool(self._figures.at_most[index] <= deadline)

    def _lateness(self, index: int) -> str:
        """How late it would be; empty if it is sure to be in time."""
        deadline, finish = self._needs.deadline, self._figures.finish[index]
        if deadline is None or self._sure(index):
            return ""
        if finish > deadline:
            return f"would be late: expected in {finish:.3g} s, the deadline is {deadline:g} s"
        return f"might be late: at most {self._figures.at_most[index]:.3g} s, the deadline is {deadline:g} s"

    def _over_horizon(self, index: int) -> str:
        """By how much its queue exceeds its horizon; empty if it does not, or has none."""
        if self._within_horizon[index]:
            return ""
        wait, most = self._figures.wait[index], self._most[index]
        return f"past its horizon: {wait:.3g} s of work ahead (limit {most:.3g})"

    def _compare(self, index: int, chosen: int | None) -> str:
        """Why a candidate as surely in time as the chosen one was not chosen."""
        if chosen is None:
            return ""
        figures, warm = self._figures, self._table.warm
        if figures.cost[index] > figures.cost[chosen]:
            return f"more expensive: {figures.cost[index]:.3g} USD against {figures.cost[chosen]:.3g}"
        if warm[chosen] > 0 and warm[index] == 0:
            return "not warm, and saves less than its estimate may err"
        if figures.finish[index] >= figures.finish[chosen]:
            return "about as cheap, not earlier"
        return "about as cheap, not drawn"
