"""Assignments that a good operator would find on recorded traffic: the first half of a trace.

What happens in the second half is unknown to them, and so are the fleet's events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from router.decide.plan import Density, Depth
from simulator.engine import played
from simulator.fleet import SERVICES
from simulator.policies.policy import STANDARD, Assignment, Cell, Fixed
from simulator.tuning.search import Search, fresh, moved
from simulator.tuning.twin import Twin, Window, usual
from simulator.workload import Workload

PLAYS = 150
"""Plays that an operator's search may use."""

BETTER = 0.999
"""A step is taken if the score falls to this share."""

JOBS = (8.0, 4.0, 16.0, 2.0)
"""Waiting and running jobs per device, of which pinning chooses one, as KEDA's users choose a target."""

Move = Mapping[Cell, int]
"""A new class for some cells."""

Play = Callable[[Assignment], float]
"""The score of an assignment."""


@dataclass(frozen=True, slots=True)
class Tried:
    """The best assignment that a descent found, its score in US dollars, and the plays that it used."""

    assignment: Assignment
    score: float
    plays: int


def tuned_split(workload: Workload, seed: int) -> Assignment:
    """A class for each model and service, by coordinate descent; classes scale by the default rule."""
    known, search = known_half(workload, seed)
    return split(search, _simulated(known, seed), PLAYS).assignment


def pinned(workload: Workload, seed: int) -> Assignment:
    """A class for each model, none of them spot, all scaled on queue depth; class and depth by coordinate descent."""
    known, search = known_half(workload, seed)
    return pin(search, _simulated(known, seed), PLAYS).assignment


def split(search: Search, play: Play, plays: int) -> Tried:
    """What `tuned_split` finds by plays of a search's window."""
    requests = Counter((job.model, job.service) for job in search.twin.window.jobs)
    moves = [{cell: place} for cell, _ in requests.most_common() for place in search.able[cell]]
    return descend(play, first_assignment(search), moves, plays=plays)


def pin(search: Search, play: Play, plays: int) -> Tried:
    """What `pinned` finds by plays of a search's window."""
    homes = _homes(search)
    start = first_assignment(search)
    first = {cell: place for model, places in homes.items() for cell, place in _home(model, places[0]).items()}
    start = moved(start, first)
    moves = [_home(model, place) for model, places in homes.items() for place in places]
    rules = [(Depth(jobs=jobs),) * len(start.rules) for jobs in JOBS]
    found = [descend(play, replace(start, rules=rule), moves, plays=plays // len(JOBS)) for rule in rules]
    return min(found, key=lambda tried: tried.score)


def descend(play: Play, start: Assignment, moves: Sequence[Move], *, plays: int) -> Tried:
    """Try the moves in turn, and take each that lowers the score, until none does or the plays are used up."""
    best, least, used, going = start, play(start), 1, True
    while going:
        going = False
        for move in moves:
            new = moved(best, move)
            if new.key == best.key:
                continue
            if used >= plays:
                return Tried(best, least, used)
            score, used = play(new), used + 1
            if score < least * BETTER:
                best, least, going = new, score, True
    return Tried(best, least, used)


def _simulated(workload: Workload, seed: int) -> Play:
    """Scores in US dollars, as the simulator has them; nothing costs anything without requests."""
    if not len(workload):
        return lambda assignment: 0.0
    return lambda assignment: played("fixed", workload, Fixed(assignment), seed=seed)[0].score


def recorded(workload: Workload) -> Window:
    """What an operator has recorded at half time."""
    middle = float(workload.trace.arrival[-1]) / 2
    return Window.latest(workload, middle, middle)


def known_half(workload: Workload, seed: int) -> tuple[Workload, Search]:
    """What an operator has recorded, and a search on it."""
    window = recorded(workload)
    fleet = window.workload.fleet
    return window.workload, Search(Twin(window, usual(fleet, fresh(fleet))), seed)


def first_assignment(search: Search) -> Assignment:
    """Live work on its fastest class, other work on its cheapest, under the default rule."""
    return Assignment(search.by_speed(), (Density(),) * search.count)


def _dollars(search: Search, cell: Cell, place: int) -> float:
    """Dollars of a cell's jobs on a class; the class's place where none is known."""
    figures = search.costs.dollars.get(cell)
    return figures[place] if figures is not None else float(place)


def _homes(search: Search) -> dict[int, list[int]]:
    """The classes that may serve all of a model's services, cheapest first; models with most requests first."""
    spot = [device.spot for device in search.twin.window.workload.fleet.classes.values()]
    homes: dict[int, list[int]] = {}
    for model, _ in Counter(job.model for job in search.twin.window.jobs).most_common():
        cell = (model, STANDARD)
        places = [place for place in search.able.get(cell, ()) if not spot[place]]
        if places:
            homes[model] = sorted(places, key=lambda place: _dollars(search, cell, place))
    return homes


def _home(model: int, place: int) -> Move:
    return {(model, service): place for service in range(len(SERVICES))}
