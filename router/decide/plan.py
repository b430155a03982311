"""The plan: which hardware classes each kind of request prefers, and how each class scales.

A tuner makes it from the fleet's recent arrivals (`simulator/tuning`); routers follow it. It crosses the state store as
JSON, so it is a msgspec value.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from router.decide.scaling_rule import ScalingRule

STALE = 600.0
"""Seconds after which a plan is no longer followed: five periods of the tuner."""


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that moves to another class stays on its `former` one until `devices` of the new class serve.

    It moves at `latest` seconds of the store's clock in any case.
    """

    former: str
    devices: int
    latest: float


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of a model, a service and a locality, and the classes that they prefer, best first."""

    model: str
    service: str
    locality: str | None = None
    classes: tuple[str, ...]
    handover: Handover | None = None


class ClassPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a class scales, and how many devices the plan expects it to need."""

    rule: ScalingRule
    devices: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the tuner decided at `made` seconds of the store's clock.

    `score` is the predicted cost and penalties in US dollars an hour. A class that is not among `classes` serves no
    planned cell: it may be switched off once all handovers are over.
    """

    number: int
    made: float
    cells: tuple[Cell, ...]
    classes: Mapping[str, ClassPlan]
    score: float = 0.0

    def stale(self, now: float) -> bool:
        """Whether it is too old to be followed at `now` seconds of the store's clock."""
        return now - self.made > STALE

    def cell(self, model: str, service: str, locality: str | None = None) -> Cell | None:
        """The plan for these requests; None if it says nothing about them."""
        wanted = (model, service, locality)
        return next((cell for cell in self.cells if (cell.model, cell.service, cell.locality) == wanted), None)


def preferred_class(cell: Cell, serving: Mapping[str, int], now: float) -> str:
    """The class that the cell's requests go to: its first one, or its former one while the first starts.

    `serving` maps each class to its devices that serve.
    """
    first, handover = cell.classes[0], cell.handover
    if handover is None or now > handover.latest or serving.get(first, 0) >= handover.devices:
        return first
    return handover.former
