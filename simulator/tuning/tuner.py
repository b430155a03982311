"""When a plan is made, and whether it is adopted. The arrivals and the fleet's state are arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulator.fleet import Fleet
from simulator.policies import Assignment, Cell
from simulator.tuning.search import Search
from simulator.tuning.twin import Conditions, Twin, Window

PERIOD = 120.0
"""Seconds between two tunings."""

WINDOW = 450.0
"""Seconds of arrivals that are played. Shorter windows made the plan follow noise."""

FIRST = 120.0
"""Seconds of arrivals before the first plan, where nothing was recorded earlier."""

PLAYS, FIRST_PLAYS = 40, 80
"""Plays of one tuning, and of the first one: about 7 s of processor time at 16 requests/s."""

HYSTERESIS = 0.1
"""A plan replaces another if it is better by this share: most of what less promises is noise."""

SERVING = 0.75
"""Share of a class's planned devices that must serve before a cell moves to it."""

GRACE = 5.0
"""Seconds after its class's start at which a cell moves in any case."""

ALARM_PACE = 1.5
"""Change of a class's pace that has the plan tuned at once."""

ALARM_LATE, ALARM_JOBS = 0.25, 40
"""Share of recent live requests that were late, of at least so many, that has the plan tuned at once."""

REST = 20.0
"""Fewest seconds between two tunings; three times as many after an alarm of lateness."""


@dataclass(frozen=True, slots=True)
class Move:
    """A cell that stays on its former class until `devices` of its new one serve, but not after `latest`.

    Without a former class, its requests are placed one by one until then.
    """

    former: int | None
    devices: int
    latest: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a tuning found. `assignment` is the one to follow, `devices` what it needs, by class.

    `before` and `after` are scores in US dollars an hour. `moves` are the handovers of an adopted assignment.
    """

    assignment: Assignment
    adopted: bool
    devices: tuple[int, ...]
    before: float
    after: float
    plays: float
    moves: Mapping[Cell, Move]


class Tuner:
    """Makes a fleet's plan and keeps it up to date. Deterministic in its seed and arguments."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._seed = seed
        self._pace: Sequence[float] = ()
        self._tuned = -math.inf
        self.assignment: Assignment | None = None
        self.tunings = 0

    def due(self, now: float, pace: Sequence[float], live: Sequence[bool]) -> bool:
        """Whether the plan shall be tuned now; `live` says of recent live requests whether each was in time."""
        since = now - self._tuned
        if self.assignment is None or since >= PERIOD:
            return since >= REST
        if since >= REST and any(max(a / b, b / a) > ALARM_PACE for a, b in zip(pace, self._pace, strict=True)):
            return True
        late = live.count(False)
        return since >= 3 * REST and len(live) >= ALARM_JOBS and late > ALARM_LATE * len(live)

    def tune(self, window: Window, fleet_now: Conditions, now: float, *, plays: int = PLAYS) -> Decision:
        """Search from the assignment in use; adopt what is better by more than `HYSTERESIS`."""
        self._tuned, self._pace = now, fleet_now.pace
        self.tunings += 1
        twin = Twin(self._fleet, window, fleet_now)
        search = Search(twin, self._seed + self.tunings)
        former = self.assignment
        found = search.find(former, plays)
        adopted = former is None or found.score < found.before * (1 - HYSTERESIS)
        if adopted:
            self.assignment = found.assignment
        chosen = self.assignment or found.assignment
        devices = tuple(twin.devices(chosen))
        moves = self._moves(former, chosen, devices, now) if adopted else {}
        return Decision(chosen, adopted, devices, found.before, found.score, twin.plays, moves)

    def _moves(
        self, former: Assignment | None, new: Assignment, devices: Sequence[int], now: float
    ) -> dict[Cell, Move]:
        """The cells that change their class."""
        starts = [device.start for device in self._fleet.classes.values()]
        moves = {}
        for cell, place in new.classes.items():
            was = former.classes[cell] if former is not None else None
            if was != place:
                needed = max(1, math.ceil(SERVING * devices[place]))
                moves[cell] = Move(was, needed, now + starts[place] + GRACE)
        return moves
