"""The cheapest instances that carry a load: an integer programme, solved by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from simulator.planner.demand import InfeasibleError
from simulator.planner.prices import Offer
from simulator.traces.workload import Figures

_INFEASIBLE = 2
"""`milp`'s status for a programme without a solution."""


class FleetTooSmallError(InfeasibleError):
    """The classes' counts do not carry the load; `lacking` is the fewest further devices that would, by class."""

    def __init__(self, lacking: Mapping[str, int], counts: Mapping[str, int]) -> None:
        more = ", ".join(f"{name} has at most {counts[name]}, {number} more" for name, number in lacking.items())
        super().__init__(f"the fleet has too few devices: {more} would do")
        self.lacking = dict(lacking)


@dataclass(frozen=True, slots=True)
class Mix:
    """How many of each offer to buy, in the order of the offers."""

    offers: tuple[Offer, ...]
    instances: tuple[int, ...]

    @property
    def usd_per_hour(self) -> float:
        """Their total cost."""
        return sum(number * offer.usd_per_hour for number, offer in zip(self.instances, self.offers, strict=True))

    def devices(self) -> dict[str, int]:
        """Devices of each class that has any."""
        found: dict[str, int] = {}
        for number, offer in zip(self.instances, self.offers, strict=True):
            if number:
                found[offer.hardware_class] = found.get(offer.hardware_class, 0) + number * offer.devices
        return found

    def changed(self, position: int, by: int) -> Mix:
        """The mix with `by` more instances of one offer."""
        instances = (*self.instances[:position], self.instances[position] + by, *self.instances[position + 1 :])
        return Mix(self.offers, instances)


def cheapest(offers: Sequence[Offer], load: Figures, counts: Mapping[str, int]) -> Mix:
    """The mix that carries every group of requests at the least cost per hour.

    A group may be split among the classes on which its load is finite; there is at least one.
    A class carries at most the load of the devices bought for it.

    Args:
        offers: what can be bought.
        load: shape (groups, classes): devices that a group keeps busy on each class.
        counts: the most devices of each class, in the order of `load`'s columns.

    Raises:
        FleetTooSmallError: the counts do not allow it.
    """
    found = _solve(offers, load, counts, unlimited=False)
    if found is None:
        beyond = _solve(offers, load, counts, unlimited=True)
        assert beyond is not None, "with unlimited devices there is always a mix"
        lacking = {name: int(more) for name, more in zip(counts, beyond[len(offers) :], strict=False) if more}
        raise FleetTooSmallError(lacking, counts)
    return Mix(tuple(offers), tuple(found[: len(offers)]))


def _solve(offers: Sequence[Offer], load: Figures, counts: Mapping[str, int], *, unlimited: bool) -> list[int] | None:
    """Whole numbers of each offer, then of further devices of each class; None if there is no solution.

    Variables: instances of each offer, further devices of each class, shares of each group on each of its classes.
    With `unlimited`, instances cost nothing and each further device 1; otherwise no further devices are available.
    """
    group, column = np.nonzero(np.isfinite(load))
    bought, classes, shares = len(offers), len(counts), len(group)
    size = bought + classes + shares
    names = list(counts)
    served = np.zeros((len(load), size))
    served[group, bought + classes + np.arange(shares)] = 1
    carried, limited = np.zeros((classes, size)), np.zeros((classes, size))
    carried[column, bought + classes + np.arange(shares)] = load[group, column]
    for position, offer in enumerate(offers):
        row = names.index(offer.hardware_class)
        carried[row, position] = -offer.devices
        limited[row, position] = offer.devices
    limited[np.arange(classes), bought + np.arange(classes)] = -1
    cost = np.zeros(size)
    cost[:bought] = [0.0 if unlimited else offer.usd_per_hour for offer in offers]
    cost[bought : bought + classes] = 1
    highest = np.full(size, np.inf)
    highest[bought : bought + classes] = np.inf if unlimited else 0
    highest[bought + classes :] = 1
    answer = milp(
        cost,
        integrality=np.arange(size) < bought + classes,
        bounds=Bounds(0, highest),
        constraints=[
            LinearConstraint(served, 1, 1),
            LinearConstraint(carried, -np.inf, 0),
            LinearConstraint(limited, -np.inf, list(counts.values())),
        ],
        options={"mip_rel_gap": 0},
    )
    if answer.status == _INFEASIBLE:
        return None
    assert answer.success, answer.message
    return [round(float(number)) for number in answer.x[: bought + classes]]
