"""Why a request is placed where it is: the recorded basis of a placement, and the table recomputed from it.

No I/O: snapshots are stored under the name that records refer to, and `api.jobs` reads them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
import numpy as np

from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Needs
from router.decide.cost import EstimateColumns, dearest, estimate_figures, horizon
from router.decide.placement import choose, prefer, reserved_and_busy, route_by_plan
from router.decide.snapshot import Backlog, FleetSnapshot
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook
from tasks.topology import Topology
from taxiway.errors import TaxiwayError


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


class RefusedCandidate(msgspec.Struct, frozen=True):
    """A hardware class and variant that could not run the request."""

    hardware_class: str
    variant: str
    reason: str


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
    refused: tuple[RefusedCandidate, ...]


class Basis(msgspec.Struct, frozen=True, array_like=True):
    """What one placement was decided from, besides its model and job id.

    `snapshot` names the stored `FleetSnapshot`. `work` maps each class to the device seconds ahead at the time of the
    decision, one figure per level, including placements made since the snapshot; classes without any are left out.
    """

    snapshot: str
    needs: Needs
    work: dict[str, tuple[float, ...]]


_encode = msgspec.json.Encoder().encode
_decode_basis = msgspec.json.Decoder(Basis).decode
_decode_fleet = msgspec.json.Decoder(FleetSnapshot).decode


def basis_text(needs: Needs, snapshot: str, classes: Sequence[str], ahead: np.ndarray) -> str:
    """A placement's basis for its job's record. `ahead` is the work it was decided from, without the job's own."""
    work = {classes[row]: tuple(ahead[row].tolist()) for row in np.flatnonzero(ahead.any(axis=1)).tolist()}
    return _encode(Basis(snapshot, needs, work)).decode()


def read_basis(text: str) -> Basis | None:
    """The basis in a job's record; None if it is absent or written by an incompatible release."""
    try:
        return _decode_basis(text) if text else None
    except msgspec.MsgspecError:
        return None


def pack_snapshot(fleet: FleetSnapshot) -> bytes:
    """A snapshot as stored: JSON, deflated because devices are much alike."""
    return zlib.compress(_encode(fleet), 1)


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
    try:
        placement = choose(table, needs, work, seed=seed)
    except TaxiwayError as error:
        rows = _Rows(table, needs, work, None)
        return Explanation(
            level=needs.level,
            reason=error.message,
            error=error.code,
            considered=rows.considered(),
            refused=rows.refused(),
        )
    held = placement.held
    rows = _Rows(table, needs, work, None if held else placement.index)
    return Explanation(
        hardware_class=None if held else placement.candidate.hardware_class,
        variant=None if held else placement.candidate.variant_name,
        level=placement.level,
        reason=placement.reason,
        held=held,
        considered=rows.considered(),
        refused=rows.refused(),
    )


class _Rows:
    """The table's candidates compared with the chosen one; `chosen` is None if none could be chosen."""

    def __init__(self, table: CandidateTable, needs: Needs, work: np.ndarray, chosen: int | None) -> None:
        self._table = table
        self._needs = needs
        self._chosen = chosen
        self._figures: EstimateColumns = estimate_figures(table, needs, work[:, : needs.level + 1].sum(axis=1))
        self._reserved_and_busy = reserved_and_busy(table, work)
        self._dearest = dearest(table, needs, self._figures.cost)
        eligible = table.live & (self._dearest <= needs.affordable)
        unreserved = prefer(~self._reserved_and_busy, eligible)
        route = route_by_plan(table, needs, self._figures, work, eligible=eligible, unreserved=unreserved)
        self._planned = route.among
        self._most = horizon(table, needs)
        self._within_horizon = self._figures.wait <= self._most

    def considered(self) -> tuple[Considered, ...]:
        """Every candidate with a live device, cheapest first."""
        figures = self._figures
        live = np.flatnonzero(self._table.live).tolist()
        return tuple(self._row(i) for i in sorted(live, key=lambda i: (figures.cost[i], figures.finish[i], i)))

    def refused(self) -> tuple[RefusedCandidate, ...]:
        """Every other class and variant, with its reason."""
        table = self._table
        absent = [table.candidates[i] for i in np.flatnonzero(~table.live).tolist()]
        return (
            *(RefusedCandidate(r.hardware_class, r.variant, r.reason) for r in table.refusals),
            *(
                RefusedCandidate(c.hardware_class, c.variant_name, c.absent or "no device of the class is live")
                for c in absent
            ),
        )

    def _row(self, index: int) -> Considered:
        table, at = self._table, self._figures.at(index)
        return Considered(
            hardware_class=table.candidates[index].hardware_class,
            variant=table.candidates[index].variant_name,
            chosen=index == self._chosen,
            why_not=None if index == self._chosen else self._why_not(index),
            finish=round(at.finish, 6),
            transfer=round(at.transfer, 6),
            wait=round(at.wait, 6),
            load=round(at.load, 6),
            run=round(at.run, 6),
            saved=round(at.saved, 6),
            at_most=round(at.at_most, 6),
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
