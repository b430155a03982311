"""What an assignment of cells to classes costs without a play: whole devices at a usual utilisation, and what is late.

It ranks assignments too badly to choose one, but a search that begins with what it finds cheap needs fewer plays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.decide.plan import TARGET
from simulator.fleet import Fleet
from simulator.policies.policy import Cell

Classes = dict[Cell, int]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimates for one fleet and load.

    `able` are the classes that a cell may use. `used` is by cell how many devices it keeps busy, `late` what it costs
    in US dollars an hour, both by class. `available` is how many devices each class may have.
    """

    fleet: Fleet
    able: Mapping[Cell, Sequence[int]]
    used: Mapping[Cell, Sequence[float]]
    late: Mapping[Cell, Sequence[float]]
    available: Sequence[int]

    def score(self, classes: Mapping[Cell, int]) -> float:
        """US dollars an hour; a class with too few devices has as much work late as does not fit."""
        load = [0.0] * len(self.available)
        for cell, busy in self.used.items():
            load[classes[cell]] += busy[classes[cell]]
        total, lacking = 0.0, [0.0] * len(load)
        for place, device in enumerate(self.fleet.classes.values()):
            wanted = math.ceil(load[place] / TARGET - 1e-9)
            devices = min(max(wanted, device.minimum), self.available[place])
            total += devices * device.usd_per_second * 3600
            lacking[place] = 1 - devices / wanted if wanted > devices else 0.0
        for (model, service), late in self.late.items():
            place = classes[model, service]
            total += late[place] + lacking[place] * self.fleet.penalties[service]
        return total

    def descend(self, classes: Mapping[Cell, int]) -> tuple[float, Classes]:
        """Move one cell at a time, or a model's live and standard work together, as long as that is cheaper."""
        best, least, going = dict(classes), self.score(classes), True
        while going:
            going = False
            for move in self._moves():
                new = best | move
                score = self.score(new)
                if score < least - 1e-9:
                    best, least, going = new, score, True
        return least, best

    def _moves(self) -> Sequence[Classes]:
        single = [{cell: place} for cell in self.used for place in self.able[cell]]
        pairs = [
            {(model, 0): place, (model, 1): place}
            for model, service in self.used
            if service == 0 and (model, 1) in self.used
            for place in self.able[model, 0]
            if place in self.able[model, 1]
        ]
        return [*single, *pairs]
