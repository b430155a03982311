"""The search for an assignment: randomised descent by plays, over cells' classes and classes' scaling rules together.

Rules belong into the search: the same placement under two scaling rules differs by as much as two placements do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from router.decide.scaling_rule import Density, Depth, ScalingRule
from simulator.fleet import Fleet
from simulator.policies import LIVE, Assignment, Cell, able_classes
from simulator.tuning.twin import Played, Twin, Window, starving
from simulator.workload import Job

RULES: tuple[ScalingRule, ...] = (
    *(Density(target=target, keep=keep) for target in (0.65, 0.8, 0.5, 1.0) for keep in (None, 300.0)),
    *(Depth(jobs=jobs) for jobs in (4.0, 8.0, 16.0, 2.0)),
)
"""The scaling rules that a class may have."""

BETTER = 0.997
"""A step is taken if the score falls to this share: plays differ by a tenth of a per cent for no reason."""

CONTENDERS, SHORT = 4, 0.12
"""Assignments from which short descents begin, and the share of all plays that each of these uses."""

TIMELY = 0.97
"""A class has a cell's jobs in time if this share of those that the best class has is in time there."""

SLACK = 2.0
"""A job counts as in time on a class where it takes at most its deadline over this: the rest is for waiting."""

LEAST = 0.05
"""Weight of a change that promises nothing, in US dollars an hour."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best assignment that a search found, its score, and that of the one it began with."""

    assignment: Assignment
    score: float
    before: float


class Search:
    """Descent from an assignment, by at most a number of plays.

    Changes are tried in random order, but those first more often that save most by the jobs' seconds and prices, or
    that concern what is late. `able` are the classes that each cell may use, and `costs` what its jobs
    cost there. `count` is the number of classes. `progress` is called with the number of plays so far.
    """

    def __init__(self, twin: Twin, seed: int, progress: Callable[[float], None] = lambda plays: None) -> None:
        self._twin = twin
        self._progress = progress
        self._fleet = twin.fleet
        self._random = random.Random(seed)
        self.able = able_classes(self._fleet, twin.window.workload.trace.models)
        self.costs = Costs.of(twin.window, self._fleet, twin.conditions.pace)
        self.count = len(self._fleet.classes)
        self._played: dict[object, Played] = {}
        self._lowest: dict[object, tuple[float, Assignment]] = {}
        self._cells = [cell for cell in self.able if cell in self.costs.dollars]

    def find(self, former: Assignment | None, plays: float) -> Found:
        """The best assignment that at most `plays` plays find: short descents from several, a long one from the best.

        Descent stays in its valley, and the one in use may have become the wrong one.
        """
        contenders = self._contenders(former)
        for contender in contenders:
            self.descend(contender, SHORT * plays)
        best = min(contenders, key=lambda contender: self._lowest[contender.key][0])
        score, assignment = self.descend(self._lowest[best.key][1], plays - self._twin.plays)
        return Found(assignment, score, self._play(former).score if former is not None else math.inf)

    def _contenders(self, former: Assignment | None) -> list[Assignment]:
        """The assignment in use, the best one by prices alone, and the cheapest ones if nothing were late."""
        starts = self.starts()
        cheap = sorted(
            starts, key=lambda start: sum(self.costs.dollars[cell][start.classes[cell]] for cell in self._cells)
        )
        found = [*([former] if former is not None else []), starts[0], *cheap]
        unlike = {assignment.key: assignment for assignment in found}
        return list(unlike.values())[:CONTENDERS]

    def descend(self, start: Assignment, plays: float) -> tuple[float, Assignment]:
        """Take the first change that is better until none is, or the plays are used up."""
        played, assignment, limit, going = self._play(start), start, self._twin.plays + plays, True
        while going:
            going = False
            for change in self._changes(assignment, self._late(played)):
                if self._twin.plays >= limit:
                    break
                if change.key in self._played:
                    continue
                result = self._play(change, played)
                if result.score < played.score * BETTER:
                    assignment, played, going = change, result, True
                    break
        self._lowest[start.key] = (played.score, assignment)
        return self._lowest[start.key]

    def starts(self) -> list[Assignment]:
        """Assignments by prices alone, best first, as classes are closed one after another."""
        best = self._by_price(set(range(self.count)))
        visited, going = {best.key: best}, True
        played = self._play(best)
        while going:
            going = False
            for fewer in [self._by_price(best.used() - {place}) for place in best.used() if self._closes(best, place)]:
                result = self._play(fewer, played)
                visited[fewer.key] = fewer
                if result.score < played.score:
                    best, played, going = fewer, result, True
        return sorted(visited.values(), key=lambda assignment: self._played[assignment.key].score)

    def _play(self, assignment: Assignment, best: Played | None = None) -> Played:
        """Play an assignment: once, unless the play ended early and its end is needed."""
        known = self._played.get(assignment.key)
        if known is None or (best is None and known.score == math.inf):
            known = self._played[assignment.key] = self._twin.play(assignment, best)
            self._progress(self._twin.plays)
        return known

    def _by_price(self, allowed: set[int]) -> Assignment:
        """Every cell on the cheapest of these classes that has its jobs in time."""
        classes = {cell: self._cheapest(cell, allowed) for cell in self.able}
        return Assignment(classes, (RULES[0],) * self.count)

    def _cheapest(self, cell: Cell, allowed: set[int]) -> int:
        places = [place for place in self.able[cell] if place in allowed] or self.able[cell]
        if cell not in self.costs.dollars:
            return places[0]
        timely = self.costs.timely[cell]
        enough = TIMELY * max(timely[place] for place in places)
        return min((self.costs.dollars[cell][place], place) for place in places if timely[place] >= enough)[1]

    def _closes(self, now: Assignment, place: int) -> bool:
        """Whether every cell of a class has another one in use."""
        rest = now.used() - {place}
        return all(rest & set(self.able[cell]) for cell in self._cells if now.classes[cell] == place)

    def _late(self, played: Played) -> Mapping[Cell, float]:
        """What each cell's late requests cost, in US dollars an hour."""
        trace, penalties = self._twin.window.workload.trace, self._fleet.penalties
        late = {}
        for model, service in self._cells:
            of_service = trace.service == service
            timely = played.timely[of_service & (trace.model == model)]
            late[model, service] = penalties[service] * float((~timely).sum()) / int(of_service.sum())
            if service == LIVE:
                late[model, service] += starving(float(timely.mean()), penalties)
        return late

    def _changes(self, now: Assignment, late: Mapping[Cell, float]) -> Sequence[Assignment]:
        """All single changes in random order, heavier ones first more often (Efraimidis and Spirakis, 2006)."""
        changes = [*self._other_classes(now, late), *self._other_rules(now, late), *self._classes_in_use(now)]
        weighed = [(weight, change) for weight, change in changes if change.key != now.key]
        keyed = [(self._random.random() ** (1 / weight), n) for n, (weight, _) in enumerate(weighed)]
        return [weighed[n][1] for _, n in sorted(keyed, reverse=True)]

    def _other_classes(self, now: Assignment, late: Mapping[Cell, float]) -> Iterator[tuple[float, Assignment]]:
        """A cell goes to another class, or a model's live and standard work together."""
        for cell in self._cells:
            for place in self.able[cell]:
                yield LEAST + self._gain(cell, now, place) + late[cell], moved(now, {cell: place})
        for model in {cell[0] for cell in self._cells}:
            pair = [cell for cell in ((model, 0), (model, 1)) if cell in late]
            for place in self.able[model, 0] if pair else ():
                gain = sum(self._gain(cell, now, place) + late[cell] for cell in pair)
                yield LEAST + 0.5 * gain, moved(now, dict.fromkeys(pair, place))

    def _gain(self, cell: Cell, now: Assignment, place: int) -> float:
        """US dollars an hour that a cell's jobs cost less on a class, if they are in time there."""
        dollars, timely, was = self.costs.dollars[cell], self.costs.timely[cell], now.classes[cell]
        return max(dollars[was] - dollars[place], 0.0) if timely[place] >= TIMELY * timely[was] else 0.0

    def _other_rules(self, now: Assignment, late: Mapping[Cell, float]) -> Iterator[tuple[float, Assignment]]:
        """A class scales by another rule."""
        for place in now.used():
            mine = [cell for cell in self._cells if now.classes[cell] == place]
            weight = LEAST + sum(self.costs.dollars[cell][place] + late[cell] for cell in mine) / len(RULES)
            for rule in RULES:
                rules = tuple(rule if k == place else other for k, other in enumerate(now.rules))
                yield weight, replace(now, rules=rules)

    def _classes_in_use(self, now: Assignment) -> Iterator[tuple[float, Assignment]]:
        """A class is given up, or taken for all cells that are cheaper there."""
        used, total = now.used(), sum(self.costs.dollars[cell][now.classes[cell]] for cell in self._cells)
        for place in range(self.count):
            if place in used and self._closes(now, place):
                mine = [cell for cell in self._cells if now.classes[cell] == place]
                yield 0.1 * total + LEAST, moved(now, {cell: self._cheapest(cell, used - {place}) for cell in mine})
            better = [cell for cell in self._cells if place in self.able[cell] and self._gain(cell, now, place)]
            if better:
                gain = sum(self._gain(cell, now, place) for cell in better)
                yield LEAST + gain, moved(now, dict.fromkeys(better, place))


@dataclass(frozen=True, slots=True)
class Costs:
    """By cell and class: mean seconds of a job `alone`, `dollars` an hour, and the share `timely` at half speed."""

    alone: Mapping[Cell, Sequence[float]]
    dollars: Mapping[Cell, Sequence[float]]
    timely: Mapping[Cell, Sequence[float]]

    @classmethod
    def of(cls, window: Window, fleet: Fleet, pace: Sequence[float]) -> Costs:
        """The costs of a window's jobs on a fleet of this pace."""
        jobs: dict[Cell, list[Job]] = {}
        for job in window.jobs:
            jobs.setdefault((job.model, job.service), []).append(job)
        usd = np.array([device.usd_per_second for device in fleet.classes.values()])
        mean, dollars, timely = {}, {}, {}
        for cell, mine in jobs.items():
            work, alone = (np.array([getattr(job, name) for job in mine]) * pace for name in ("work", "alone"))
            due = np.array([[job.deadline] for job in mine])
            mean[cell] = alone.mean(axis=0).tolist()
            dollars[cell] = (work.sum(axis=0) * usd * 3600 / window.span).tolist()
            timely[cell] = (alone * SLACK <= due).mean(axis=0).tolist()
        return cls(mean, dollars, timely)


def moved(now: Assignment, moves: Mapping[Cell, int]) -> Assignment:
    """The assignment with some cells on other classes."""
    return replace(now, classes={**now.classes, **moves})


def fresh(fleet: Fleet) -> tuple[int, ...]:
    """The devices that are on when a trace begins."""
    return tuple(max(device.initial, device.minimum) for device in fleet.classes.values())
