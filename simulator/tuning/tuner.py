"""When a plan is made, and whether it is adopted. The arrivals and the fleet's state are arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from simulator.fleet import Fleet
from simulator.policies.policy import Assignment, Cell
from simulator.tuning.search import Search
from simulator.tuning.twin import Conditions, Twin, Window

PERIOD = 120.0
"""Seconds between two tunings."""

WINDOW = 450.0
"""Seconds of arrivals that are played. Shorter windows made the plan follow noise."""

FIRST = 45.0
"""Seconds of arrivals before the first plan, where nothing was recorded earlier. It is tuned again when twice as much
is known, until that takes a period."""

PLAYED, PLAYS = 300_000, 200
"""Arrivals that one search plays, about 7 s of processor time; and its plays at most, where windows are short."""

LEAST = 225.0
"""Seconds of arrivals that are played at least: shorter windows are followed by arrivals drawn from them, so that a
plan is not made for a lull."""

HYSTERESIS = 0.08
"""A plan replaces another if it is better by this share on arrivals that the search has not seen."""

DRAWS = 3
"""Windows that are drawn anew from the one that was searched on, to compare plans: it must be better on each."""

SERVING = 0.75
"""Share of a class's planned devices that must serve before a cell moves to it."""

GRACE = 5.0
"""Seconds after its class's start at which a cell moves in any case."""

ALARM_PACE = 1.5
"""Change of a class's pace that has the plan tuned at once."""

ALARM_LATE, ALARM_JOBS = 0.25, 40
"""Share of recent live requests that were late, of at least so many, that has the plan tuned at once."""

RECENT = 30.0
"""Seconds of live answers that an alarm looks at."""

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
    """What a tuning found. `assignment` is the one to follow, `devices` what it needs at least, by class.

    `begin` is how many devices would be on by now if it had been followed, by class: others are let go, but none is
    started for what is over. `before` and `after` are scores in US dollars an hour, those of an adopted assignment on
    arrivals that were not searched on. `moves` are its handovers.
    """

    assignment: Assignment
    adopted: bool
    devices: tuple[int, ...]
    begin: tuple[int, ...]
    before: float
    after: float
    plays: float
    moves: Mapping[Cell, Move]

    @property
    def predicted(self) -> float:
        """The score of the assignment to follow."""
        return self.after if self.adopted else self.before


@dataclass(frozen=True, slots=True)
class Watch:
    """What the last tuning knew: when it was, the seconds of arrivals that it had, and the classes' pace."""

    tuned: float = -math.inf
    span: float = math.inf
    pace: Sequence[float] = ()

    def due(self, now: float, pace: Sequence[float], live: Sequence[bool], period: float = PERIOD) -> bool:
        """Whether to tune now; `live` says of recent live requests whether each was in time."""
        since = now - self.tuned
        if since >= max(min(period, self.span), REST):
            return True
        if since >= REST and any(max(a / b, b / a) > ALARM_PACE for a, b in zip(pace, self.pace, strict=True)):
            return True
        return since >= 3 * REST and len(live) >= ALARM_JOBS and live.count(False) > ALARM_LATE * len(live)


def plays_for(window: Window) -> int:
    """Plays of a search on this window."""
    return min(PLAYS, max(PLAYED // max(len(window.jobs), 1), 1))


def _compared(
    former: Assignment | None, good: Sequence[Assignment], twins: Sequence[Twin]
) -> tuple[Assignment, float, float, bool]:
    """The best of these on windows that were not searched on, the former one's score and its, and whether to adopt it.

    It must be clearly better on each window.
    """
    scores = {found: [twin.play(found).score for twin in twins] for found in good}
    best = min(good, key=lambda found: fmean(scores[found]))
    before = [twin.play(former).score if former is not None else math.inf for twin in twins]
    clearly = all(new < old * (1 - HYSTERESIS) for new, old in zip(scores[best], before, strict=True))
    return best, fmean(before), fmean(scores[best]), clearly


class Tuner:
    """Makes a fleet's plan and keeps it up to date. Deterministic in its seed and arguments.

    `assignment` is the one in use, and `good` are those that the last search found.
    """

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._seed = seed
        self._watch = Watch()
        self.good: tuple[Assignment, ...] = ()
        self.assignment: Assignment | None = None
        self.tunings = 0

    def due(self, now: float, pace: Sequence[float], live: Sequence[bool]) -> bool:
        """Whether the plan shall be tuned now; `live` says of recent live requests whether each was in time."""
        return self._watch.due(now, pace, live)

    def drop(self, now: float) -> None:
        """The plan is followed no longer; the next one is made a period later."""
        self.assignment = None
        self._watch = Watch(now, PERIOD, self._watch.pace)

    def tune(self, window: Window, fleet_now: Conditions, now: float, *, plays: int | None = None) -> Decision:
        """Search from the assignment in use; adopt what is better by more than `HYSTERESIS` on redrawn arrivals."""
        self._watch = Watch(now, window.span, fleet_now.pace)
        self.tunings += 1
        seed = self._seed + self.tunings
        window = window.extended(seed, LEAST)
        twin = Twin(self._fleet, window, fleet_now)
        search = Search(twin, seed)
        former = self.assignment
        found = search.find(former, plays_for(window) if plays is None else plays, self.good)
        self.good = found.good
        best, before, after, adopted = found.assignment, found.before, found.score, False
        twins = list[Twin]()
        if found.score < found.before * (1 - HYSTERESIS):
            twins = [Twin(self._fleet, window.redrawn(seed + draw), fleet_now) for draw in range(DRAWS)]
            best, before, after, adopted = _compared(former, found.good, twins)
        if adopted:
            self.assignment = best
        chosen = self.assignment or best
        devices, begin = tuple(twin.devices(chosen)), twin.play(chosen).powered
        moves = self._moves(former, chosen, devices, now) if adopted else {}
        used = twin.plays + sum(other.plays for other in twins)
        return Decision(chosen, adopted, devices, begin, before, after, used, moves)

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
