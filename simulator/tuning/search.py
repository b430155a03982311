"""The search for an assignment: randomised descent by plays, over cells' classes and classes' scaling rules together.

Rules belong into the search: the same placement under two scaling rules differs by as much as two placements do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from router.decide.scaling_rule import Density, Depth, ScalingRule
from simulator.fleet import Fleet
from simulator.policies.fixed import Assignment, Cell, able_classes
from simulator.tuning.twin import Played, Twin, Window

RULES: tuple[ScalingRule, ...] = (
    *(Density(target=target, keep=keep) for target in (0.65, 0.8, 0.5, 1.0) for keep in (None, 300.0)),
    *(Depth(jobs=jobs) for jobs in (4.0, 8.0, 16.0, 2.0)),
)
"""The scaling rules that a class may have."""

BETTER = 0.997
"""A step is taken if the score falls to this share: plays differ by a tenth of a per cent for no reason."""

Score = Callable[[Assignment], Played]


@dataclass(frozen=True, slots=True)
class Found:
    """The best assignment that a search found, its score, and that of the one it began with."""

    assignment: Assignment
    score: float
    before: float
    plays: int


class Search:
    """Descent from an assignment, by at most a number of plays.

    What it tries first is random, but weighted: cells and classes that cost most, or are late most, come first.
    `able` are the classes that each cell may use.
    """

    def __init__(self, twin: Twin, seed: int) -> None:
        self._twin = twin
        self._fleet = twin.fleet
        self._random = random.Random(seed)
        self._usd = [device.usd_per_second for device in self._fleet.classes.values()]
        models = twin.window.workload.trace.models
        self.able = able_classes(self._fleet, models)
        self._alone, self._unit = _seconds_by_cell(twin.window, twin.conditions.pace)
        self._cells = [cell for cell in self.able if cell in self._unit]

    def descend(self, start: Assignment, plays: int) -> Found:
        """Take the first step that is better until none is, or the plays are used up."""
        first = self._twin.play(start)
        best, assignment, played, tried = first.score, start, first, 1
        seen = {start.key}
        going = True
        while going and tried < plays:
            going = False
            for step in self._steps(assignment, self._weights(assignment, played)):
                if step.key in seen:
                    continue
                if tried >= plays:
                    break
                seen.add(step.key)
                result = self._twin.play(step)
                tried += 1
                if result.score < best * BETTER:
                    best, assignment, played, going = result.score, step, result, True
                    break
        return Found(assignment, best, first.score, tried)

    def starts(self) -> list[Assignment]:
        """Assignments to begin with: live work on its fastest class or on its cheapest, under three rules."""
        cheapest = {cell: min(places, key=lambda place: self.cost(cell, place)) for cell, places in self.able.items()}
        fastest = {
            cell: min(places, key=lambda place: self._alone[cell][place]) if cell in self._alone else cheapest[cell]
            for cell, places in self.able.items()
        }
        mixed = {cell: fastest[cell] if cell[1] == 0 else cheapest[cell] for cell in self.able}
        return [
            Assignment(classes, (rule,) * len(self._usd))
            for rule in (RULES[0], RULES[1], Depth(jobs=8.0))
            for classes in (mixed, cheapest)
        ]

    def best_start(self) -> Assignment:
        """The best of `starts`."""
        return min(self.starts(), key=lambda start: self._twin.play(start).score)

    def cost(self, cell: Cell, place: int) -> float:
        """US dollars of a request of the cell on a class, on average; the price of a second where none is known."""
        return self._unit[cell][place] * self._usd[place] if cell in self._unit else self._usd[place]

    def _weights(self, assignment: Assignment, played: Played) -> Mapping[Cell, float]:
        """What each cell costs now, in US dollars an hour: its device seconds, and its penalty."""
        trace, span = self._twin.window.workload.trace, self._twin.window.span
        penalties = self._fleet.penalties
        weights = {}
        for cell in self._cells:
            of_service = trace.service == cell[1]
            rows = of_service & (trace.model == cell[0])
            late = float((~played.timely[rows]).sum()) / max(int(of_service.sum()), 1)
            used = 3600 * float(rows.sum()) / span * self.cost(cell, assignment.classes[cell])
            weights[cell] = 0.02 * penalties[0] / 4 + penalties[cell[1]] * late + used
        return weights

    def _steps(self, now: Assignment, weights: Mapping[Cell, float]) -> Sequence[Assignment]:
        """All single changes in random order, heavier ones first more often (Efraimidis and Spirakis, 2006)."""
        steps = [(weight, step) for weight, step in self._changes(now, weights) if step.key != now.key]
        keyed = [(self._random.random() ** (1 / max(weight, 1e-9)), n) for n, (weight, _) in enumerate(steps)]
        return [steps[n][1] for _, n in sorted(keyed, reverse=True)]

    def _changes(self, now: Assignment, weights: Mapping[Cell, float]) -> Iterator[tuple[float, Assignment]]:
        yield from self._other_classes(now, weights)
        yield from self._other_rules(now, weights)
        yield from self._fewer_classes(now, weights)

    def _other_classes(self, now: Assignment, weights: Mapping[Cell, float]) -> Iterator[tuple[float, Assignment]]:
        """A cell goes to another class, or a model's live and standard work together."""
        for cell, weight in weights.items():
            for place in self.able[cell]:
                yield weight / len(self.able[cell]), _moved(now, {cell: place})
        for model in {cell[0] for cell in weights}:
            mine = sum(weight for cell, weight in weights.items() if cell[0] == model)
            places = self.able[model, 0]
            for place in places:
                yield 0.4 * mine / len(places), _moved(now, {(model, 0): place, (model, 1): place})

    def _other_rules(self, now: Assignment, weights: Mapping[Cell, float]) -> Iterator[tuple[float, Assignment]]:
        """A class scales by another rule."""
        used, total = now.used(), sum(weights.values())
        for place in used:
            for rule in RULES:
                rules = tuple(rule if k == place else other for k, other in enumerate(now.rules))
                yield 0.6 * total / len(used) / len(RULES), replace(now, rules=rules)

    def _fewer_classes(self, now: Assignment, weights: Mapping[Cell, float]) -> Iterator[tuple[float, Assignment]]:
        """A class is given up: its cells go to the cheapest of the others."""
        used = now.used()
        for place in used:
            moves: dict[Cell, int] = {}
            mine = [cell for cell in weights if now.classes[cell] == place]
            for cell in mine:
                rest = [other for other in self.able[cell] if other in used and other != place]
                if rest:
                    moves[cell] = min((self.cost(cell, other), other) for other in rest)[1]
            if len(moves) == len(mine):
                yield 0.1 * sum(weights.values()), _moved(now, moves)


def _moved(now: Assignment, moves: Mapping[Cell, int]) -> Assignment:
    return replace(now, classes={**now.classes, **moves})


def _seconds_by_cell(window: Window, pace: Sequence[float]) -> tuple[dict[Cell, list[float]], dict[Cell, list[float]]]:
    """Mean seconds alone and mean device seconds of each cell's jobs, by class."""
    alone: dict[Cell, list[tuple[float, ...]]] = {}
    work: dict[Cell, list[tuple[float, ...]]] = {}
    for job in window.jobs:
        cell = (job.model, job.service)
        alone.setdefault(cell, []).append(job.alone)
        work.setdefault(cell, []).append(job.work)

    def mean(rows: dict[Cell, list[tuple[float, ...]]]) -> dict[Cell, list[float]]:
        return {cell: (np.mean(figures, axis=0) * np.array(pace)).tolist() for cell, figures in rows.items()}

    return mean(alone), mean(work)


def fresh(fleet: Fleet) -> tuple[int, ...]:
    """The devices that are on when a trace begins."""
    return tuple(max(device.initial, device.minimum) for device in fleet.classes.values())
