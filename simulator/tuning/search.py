"""The search for an assignment: randomised descent by plays, over cells' classes and classes' scaling rules together.

Rules belong into the search: the same placement under two scaling rules differs by as much as two placements do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from router.decide.plan import TARGET, Density, Depth, ScalingRule
from simulator.fleet import Fleet
from simulator.policies.policy import LIVE, Assignment, Cell, able_classes
from simulator.tuning.twin import HOPELESS, Played, Twin, Window, starving
from simulator.workload import figures_of
from taxiway.contract.job import Tokens

RULES: tuple[ScalingRule, ...] = (
    *(Density(target=target, keep=keep) for target in (0.65, 1.0, 1.5, 2.0) for keep in (None, 300.0)),
    *(Depth(jobs=jobs, keep=keep) for jobs in (4.0, 8.0, 16.0, 32.0) for keep in (90.0, 300.0)),
)
"""The scaling rules that a class may have.

Targets over 1 are for generating models: their work counts by a high quantile of answers' lengths and in batches of
eight, so a device in full batches can do twice as much."""

ROUGH = 1.4
"""A contender's play ends early if it is this many times worse than the best one's: descents gain less."""

BETTER = 0.997
"""A step is taken if the score falls to this share: plays differ by a tenth of a per cent for no reason."""

ESTIMATED, CONTENDERS, SHORT = 3, 3, 0.15
"""Assignments that are taken from estimates; those from which short descents begin, and each one's share of plays."""

TIMELY = 0.97
"""A class has a cell's jobs in time if this share of those that the best class has is in time there."""

SLACK = 2.0
"""A job counts as in time on a class where it takes at most its deadline over this: the rest is for waiting."""

LEAST = 0.05
"""Weight of a change that promises nothing, in US dollars an hour."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best assignment that a search found, its score, and that of the one it began with.

    `good` are the ends of all descents, the best one first.
    """

    assignment: Assignment
    score: float
    before: float
    good: tuple[Assignment, ...]


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
        self.costs = Costs.of(twin.window)
        self.count = len(self._fleet.classes)
        self._played: dict[object, Played] = {}
        self._lowest: dict[object, tuple[float, Assignment]] = {}
        self._cells = [cell for cell in self.able if cell in self.costs.dollars]

    def find(self, former: Assignment | None, plays: float, known: Sequence[Assignment] = ()) -> Found:
        """The best assignment that at most `plays` plays find: short descents from several, a long one from the best.

        Descent stays in its valley, and the one in use may have become the wrong one. `known` are good assignments of
        earlier searches.
        """
        found = [*([former] if former is not None else []), *known, *self.estimated()]
        unlike = {assignment.key: assignment for assignment in found}
        contenders = self._ranked(list(unlike.values()))[:CONTENDERS]
        for contender in contenders:
            self.descend(contender, SHORT * plays)
        contenders.sort(key=lambda contender: self._lowest[contender.key][0])
        ends = [self._lowest[contender.key][1] for contender in contenders]
        score, assignment = self.descend(ends[0], plays - self._twin.plays)
        before = self._play(former).score if former is not None else math.inf
        good = {end.key: end for end in (assignment, *ends[1:])}
        return Found(assignment, score, before, tuple(good.values()))

    def _ranked(self, contenders: Sequence[Assignment]) -> list[Assignment]:
        """The contenders by their scores, best first; those that no descent will make good are played in part."""
        best: Played | None = None
        for contender in contenders:
            played = self._play(contender, best, ROUGH)
            if best is None or played.score < best.score:
                best = played
        return sorted(contenders, key=lambda contender: self._played[contender.key].score)

    def estimated(self) -> list[Assignment]:
        """The assignments that estimates find cheapest, best first: local minima, as classes are closed."""
        estimate = self.estimate()
        everywhere = set(range(self.count))
        starts = [self._by_price(everywhere), *(self._by_price(everywhere - {place}) for place in everywhere)]
        ends = [estimate.descend(start.classes) for start in starts]
        ends.sort(key=lambda end: end[0])
        unlike: dict[frozenset[int], Assignment] = {}
        for _, classes in ends:
            unlike.setdefault(frozenset(classes.values()), Assignment(classes, self._usual_rules(classes)))
        return list(unlike.values())[:ESTIMATED]

    def _usual_rules(self, classes: Mapping[Cell, int]) -> tuple[ScalingRule, ...]:
        """For each class the rule that keeps devices for the work that there was, although it scales on predictions."""
        rules = []
        for place in range(self.count):
            mine = [cell for cell in self._cells if classes[cell] == place]
            done = sum(self._twin.work[cell][place] for cell in mine)
            expected = sum(self._twin.expected[cell][place] for cell in mine)
            target = TARGET * expected / done if done else TARGET
            rules.append(min(RULES, key=lambda rule: _from_target(rule, target)))
        return tuple(rules)

    def estimate(self) -> Estimate:
        """What assignments cost by figures alone."""
        twin, costs, penalties = self._twin, self.costs, self._fleet.penalties
        used = {cell: [work / twin.window.span for work in twin.work[cell]] for cell in self._cells}
        besides = {
            cell: [
                metered
                + costs.share[cell] * penalties[cell[1]] * (1 - timely)
                + (starving(timely, penalties) if cell[1] == LIVE else 0.0)
                for metered, timely in zip(costs.metered[cell], costs.timely[cell], strict=True)
            ]
            for cell in self._cells
        }
        return Estimate(self._fleet, self.able, used, besides, twin.conditions.available)

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

    def _play(self, assignment: Assignment, best: Played | None = None, hopeless: float = HOPELESS) -> Played:
        """Play an assignment: once, unless the play ended early and its end is needed."""
        known = self._played.get(assignment.key)
        if known is None or (best is None and known.score == math.inf):
            known = self._played[assignment.key] = self._twin.play(assignment, best, hopeless)
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


def _from_target(rule: ScalingRule, target: float) -> float:
    """How far a rule is from scaling to this utilisation."""
    return abs(rule.target - target) if isinstance(rule, Density) else math.inf


@dataclass(frozen=True, slots=True)
class Costs:
    """By cell and class: mean seconds of a job `alone`, `dollars` an hour, and the share `timely` at half speed.

    `share` is the cell's part of its service's requests, and `metered` the part of the dollars that is paid by use.
    """

    share: Mapping[Cell, float]
    alone: Mapping[Cell, Sequence[float]]
    dollars: Mapping[Cell, Sequence[float]]
    metered: Mapping[Cell, Sequence[float]]
    timely: Mapping[Cell, Sequence[float]]

    @classmethod
    def of(cls, window: Window) -> Costs:
        """The costs of a window's jobs."""
        trace, fleet = window.workload.trace, window.workload.fleet
        alone, work, _ = figures_of(trace, fleet, trace.output)
        usd = np.array([device.usd_per_second for device in fleet.classes.values()])
        tariffs = [device.price.tariff for device in fleet.classes.values()]
        share, mean, dollars, metered, timely = {}, {}, {}, {}, {}
        for cell in sorted({(job.model, job.service) for job in window.jobs}):
            of_service = trace.service == cell[1]
            mine = of_service & (trace.model == cell[0])
            seconds = alone[mine]
            share[cell] = float(mine.sum() / of_service.sum())
            mean[cell] = seconds.mean(axis=0).tolist()
            tokens = Tokens(input=int(trace.size[mine].sum()), output=int(trace.output[mine].sum()))
            bills = [0.0 if tariff is None else tariff.bill(tokens, int(mine.sum())) for tariff in tariffs]
            metered[cell] = [bill * 3600 / window.span for bill in bills]
            dollars[cell] = ((work[mine].sum(axis=0) * usd + bills) * 3600 / window.span).tolist()
            timely[cell] = (seconds * SLACK <= trace.deadline[mine][:, None]).mean(axis=0).tolist()
        return cls(share, mean, dollars, metered, timely)


def moved(now: Assignment, moves: Mapping[Cell, int]) -> Assignment:
    """The assignment with some cells on other classes."""
    return replace(now, classes={**now.classes, **moves})


def fresh(fleet: Fleet) -> tuple[int, ...]:
    """The devices that are on when a trace begins."""
    return tuple(max(device.initial, device.minimum) for device in fleet.classes.values())


Classes = dict[Cell, int]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimates for one fleet and load.

    `able` are the classes that a cell may use. `used` is by cell how many devices it keeps busy, `besides` what it
    costs in US dollars an hour besides devices (use of an endpoint, and what is late), both by class. `available` is
    how many devices each class may have.
    """

    fleet: Fleet
    able: Mapping[Cell, Sequence[int]]
    used: Mapping[Cell, Sequence[float]]
    besides: Mapping[Cell, Sequence[float]]
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
        for (model, service), besides in self.besides.items():
            place = classes[model, service]
            total += besides[place] + lacking[place] * self.fleet.penalties[service]
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
