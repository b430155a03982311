"""A placement from a whole situation, and every candidate that it could have chosen."""

from dataclasses import dataclass

import numpy as np

from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Candidate, Needs
from router.decide.cost import Estimate, dearest
from router.decide.placement import Placement, choose
from router.decide.snapshot import Backlog, FleetSnapshot
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook
from tasks.topology import Topology


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate with its figures in the choice."""

    candidate: Candidate
    estimate: Estimate[float]


def place(model: Model, needs: Needs, topology: Topology, fleet: FleetSnapshot, *, seed: int = 0) -> Placement:
    """The choice for one request in this fleet."""
    table = build_table(model, needs.constraints, topology, fleet, ProfileBook())
    return choose(table, needs, work_in(fleet, table), seed=seed)


def work_in(fleet: FleetSnapshot, table: CandidateTable) -> np.ndarray:
    """The work that a choice counts, as in `choose`: none is known of a stale fleet."""
    return Backlog(table.classes, {} if fleet.stale else fleet.work).seconds


def choice_of(placement: Placement) -> Option:
    """What was chosen."""
    return _option(placement, placement.index)


def options_of(placement: Placement) -> list[Option]:
    """Every candidate that could have been chosen, cheapest first."""
    table, figures = placement.table, placement.figures
    able = table.live & (dearest(table, placement.needs, figures.cost) <= placement.needs.affordable)
    rows = sorted(np.flatnonzero(able).tolist(), key=lambda i: (figures.cost[i], figures.finish[i], i))
    return [_option(placement, row) for row in rows]


def _option(placement: Placement, row: int) -> Option:
    return Option(placement.table.candidates[row], placement.figures.at(row))
