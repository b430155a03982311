"""What placement sees between two readings of the fleet: a snapshot, boards laid out from it, and work added since."""

from __future__ import annotations

import numpy as np

from router.board import Board, lay_out
from router.classify import Constraints, Needs
from router.fleet import Backlog, FleetSnapshot
from router.placement import Placement, choose
from router.tenants import Tenants
from tasks.catalogue import Model
from tasks.profiles import ProfileBook
from tasks.topology import Topology


class Outlook:
    """One snapshot and all that is worked out from it once; placements add to `backlog` and to what `tenants` spent.

    `reading` is the name under which the snapshot is kept for explanations.
    """

    def __init__(
        self,
        topology: Topology,
        book: ProfileBook,
        fleet: FleetSnapshot,
        reading: str = "",
        tenants: Tenants | None = None,
    ) -> None:
        self.fleet = fleet
        self.tenants = tenants or Tenants()
        self.reading = reading
        self.backlog = Backlog(tuple(sorted(topology.hardware)), {} if fleet.stale else fleet.work)
        self._devices = np.array([float(len(fleet.of_class(name))) for name in self.backlog.classes])
        self._topology = topology
        self._book = book
        self._boards: dict[tuple[str, Constraints], Board] = {}

    def place(self, model: Model, needs: Needs, seed: int) -> Placement:
        """Choose for a request. Raises what `choose` raises. Its work is counted only by `count`."""
        return choose(self.board(model, needs.constraints), needs, self.backlog.seconds, seed=seed)

    def board(self, model: Model, constraints: Constraints) -> Board:
        """The model's candidates for all requests with these constraints."""
        key = (model.id, constraints)
        board = self._boards.get(key)
        if board is None:
            board = lay_out(model, constraints, self._topology, self.fleet, self._book)
            self._boards[key] = board
        return board

    def pass_time(self, seconds: float) -> None:
        """Let the devices work off what waits: a reading tells what was done before it, nothing of what is since."""
        self.backlog.serve(self._devices * seconds)

    def count(self, placement: Placement) -> None:
        """Count the work and the cost of a placement that is on its way to its queue."""
        self.backlog.add(placement.candidate.hardware_class, placement.level, placement.work)
        if placement.needs.allowance is not None:
            self.tenants.spend(placement.needs.allowance, placement.cost)
