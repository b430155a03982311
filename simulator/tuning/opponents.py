"""Assignments that a good operator would find on recorded traffic: the first half of a trace.

What happens in the second half is unknown to them, and so are the fleet file's events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from router.decide.plan import Density, Depth
from simulator.engine import simulate
from simulator.fleet import SERVICES
from simulator.policies.policy import LIVE, STANDARD, Assignment, Cell, Fixed
from simulator.tuning.search import Search, fresh, moved
from simulator.tuning.twin import Conditions, Twin, Window
from simulator.workload import Workload

PLAYS = 150
"""Plays that an operator's search may use."""

BETTER = 0.999
"""A step is taken if the score falls to this share."""

JOBS = (8.0, 4.0, 16.0, 2.0)
"""Waiting and running jobs per device, of which pinning chooses one, as KEDA's users choose a target."""

Move = Mapping[Cell, int]
"""A new class for some cells."""


@dataclass(frozen=True, slots=True)
class Tried:
    """The best assignment that a descent found, its score in US dollars, and the plays that it used."""

    assignment: Assignment
    score: float
    plays: int


def tuned_split(workload: Workload, seed: int) -> Assignment:
    """A class for each model and service, by coordinate descent; classes scale by the default rule."""
    known, search = known_half(workload, seed)
    moves = [{cell: place} for cell in _by_requests(known) for place in search.able[cell]]
    return descend(known, first_assignment(search), moves, plays=PLAYS, seed=seed).assignment


def pinned(workload: Workload, seed: int) -> Assignment:
    """A class for each model, none of them spot, all scaled on queue depth; class and depth by coordinate descent."""
    known, search = known_half(workload, seed)
    homes = _homes(known, search)
    start = first_assignment(search)
    first = {cell: place for model, places in homes.items() for cell, place in _home(model, places[0]).items()}
    start = moved(start, first)
    moves = [_home(model, place) for model, places in homes.items() for place in places]
    rules = [(Depth(jobs=jobs),) * len(start.rules) for jobs in JOBS]
    found = [descend(known, replace(start, rules=rule), moves, plays=PLAYS // len(JOBS), seed=seed) for rule in rules]
    return min(found, key=lambda tried: tried.score).assignment


def descend(known: Workload, start: Assignment, moves: Sequence[Move], *, plays: int, seed: int) -> Tried:
    """Try the moves in turn, and take each that lowers the score, until none does or the plays are used up."""
    if not len(known):
        return Tried(start, 0.0, 0)
    best, least, used, going = start, _score(known, start, seed), 1, True
    while going:
        going = False
        for move in moves:
            new = moved(best, move)
            if new.key == best.key:
                continue
            if used >= plays:
                return Tried(best, least, used)
            score, used = _score(known, new, seed), used + 1
            if score < least * BETTER:
                best, least, going = new, score, True
    return Tried(best, least, used)


def _score(workload: Workload, assignment: Assignment, seed: int) -> float:
    return simulate("fixed", workload, Fixed(assignment), seed=seed).score


def recorded(workload: Workload) -> Window:
    """What an operator has recorded at half time."""
    middle = float(workload.trace.arrival[-1]) / 2
    return Window.latest(replace(workload, fleet=replace(workload.fleet, events=())), middle, middle)


def known_half(workload: Workload, seed: int) -> tuple[Workload, Search]:
    """What an operator has recorded, and a search on it."""
    window = recorded(workload)
    fleet = window.workload.fleet
    return window.workload, Search(Twin(window, Conditions.usual(fleet, fresh(fleet))), seed)


def first_assignment(search: Search) -> Assignment:
    """Live work on its fastest class, other work on its cheapest, under the default rule."""
    classes = {
        cell: min(places, key=lambda place: _cost(search, cell, place, live=cell[1] == LIVE))
        for cell, places in search.able.items()
    }
    return Assignment(classes, (Density(),) * search.count)


def _cost(search: Search, cell: Cell, place: int, *, live: bool = False) -> float:
    """Dollars of a cell's jobs on a class, or their seconds if it is live; the class's place where none is known."""
    figures = (search.costs.alone if live else search.costs.dollars).get(cell)
    return figures[place] if figures is not None else float(place)


def _by_requests(known: Workload) -> list[Cell]:
    """The cells that have requests, those with most first."""
    counts = Counter(zip(known.trace.model.tolist(), known.trace.service.tolist(), strict=True))
    return [cell for cell, _ in counts.most_common()]


def _homes(known: Workload, search: Search) -> dict[int, list[int]]:
    """The classes that may serve all of a model's services, cheapest first; models with most requests first."""
    spot = [device.spot for device in known.fleet.classes.values()]
    homes: dict[int, list[int]] = {}
    for model, _ in Counter(known.trace.model.tolist()).most_common():
        cell = (model, STANDARD)
        places = [place for place in search.able.get(cell, ()) if not spot[place]]
        if places:
            homes[model] = sorted(places, key=lambda place: _cost(search, cell, place))
    return homes


def _home(model: int, place: int) -> Move:
    return {(model, service): place for service in range(len(SERVICES))}
