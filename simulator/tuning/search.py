"""The search for an assignment: descents by plays, over cells' classes and classes' scaling rules together.

Rules belong into the search: the same placement under two scaling rules differs by as much as two placements do.
Short plays choose where descents begin: estimates rank placements badly.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from statistics import fmean

import numpy as np

from router.decide.plan import TARGET, Density, Depth, ScalingRule
from simulator.fleet import USABLE, Fleet
from simulator.policies.policy import LIVE, STANDARD, Assignment, Cell, able_classes
from simulator.tuning.twin import HOPELESS, Played, Twin, Window, starving
from simulator.workload import figures_of
from taxiway.contract.job import Tokens

RULES: tuple[ScalingRule, ...] = (
    *(Density(target=target, keep=keep) for target in (0.65, 1.0, 1.5, 2.0) for keep in (None, 300.0)),
    *(Depth(jobs=jobs, keep=keep) for jobs in (2.0, 4.0, 8.0, 16.0, 32.0) for keep in (90.0, 300.0)),
)
"""The scaling rules that a class may have.

Targets over 1 are for generating models: their work counts by a high quantile of answers' lengths and in batches of
eight, so a device in full batches can do twice as much."""

FEWEST = Density(target=2.0)
"""The rule that keeps fewest devices: work often moves so that the class it leaves needs one less."""

ROUGH = 1.4
"""A contender's play ends early if it is this many times worse than the best one's: descents gain less."""

BETTER = 0.997
"""A step is taken if the score falls to this share: plays differ by a tenth of a per cent for no reason."""

CONTENDERS, RACE, ROUND = 3, 0.15, 0.3
"""Assignments from which descents begin, the share of all plays that chooses them at most, and that after which the
worse half of the descents end."""

DEPTHS = tuple(Depth(jobs=jobs, keep=300.0) for jobs in (4.0, 2.0, 8.0, 16.0))
"""Rules to begin with, beside the density at which classes are usually full: placements are compared by the first."""

TIMELY = 0.97
"""A class has a cell's jobs in time if this share of those that the best class has is in time there."""

SLACK = 2.0
"""A job counts as in time on a class where it takes at most its deadline over this: the rest is for waiting."""

LEAST, WHOLE, UNUSED = 0.3, 3.0, 0.2
"""What a change that promises nothing is taken to gain, as a share of what changes promise on average; how much more
often models move than cells, and how often what moves goes to a class that nothing uses."""

CLOSE, PATIENT = 1.05, math.inf
"""A descent's play ends early if it is this many times worse by then. Where no change is better, a patient one plays to
the end what ended so, as far as plays are left: what a later burst needs only costs before it."""

Rules = tuple[ScalingRule, ...]

Classes = dict[Cell, int]
"""The class of each cell, by its place in the fleet."""

Option = tuple[int, float, int]
"""A class for some cells: how many of them are late there, what they cost there, and its place."""


@dataclass(frozen=True, slots=True)
class Change:
    """Other classes of cells and other rules of classes; what it may gain in US dollars an hour.

    `often` is how often it is tried beside others that gain as much.
    """

    classes: Mapping[Cell, int]
    rules: Mapping[int, ScalingRule]
    gain: float
    often: float = 1.0

    def of(self, now: Assignment) -> Assignment:
        """The assignment with this change."""
        return Assignment({**now.classes, **self.classes}, ruled(now.rules, self.rules))


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

    Whole models move first. Then changes are tried in random order, but those first more often that save most by the
    jobs' seconds and prices, or that concern what is late. `able` are the classes that each cell may use, and `costs`
    what its jobs cost there. `count` is the number of classes.

    Without `lean` it leaves out changes after which a class has little to spare, and what only pays late: plans for
    few arrivals were fitted to them.
    """

    def __init__(self, twin: Twin, seed: int, *, lean: bool = True) -> None:
        self.twin, self._lean = twin, lean
        self._fleet = twin.fleet
        self._random = random.Random(seed)
        self.able = able_classes(self._fleet, twin.window.workload.trace.models)
        self.costs = Costs.of(twin.window)
        self.count = len(self._fleet.classes)
        self._played: dict[object, Played] = {}
        self._cells = [cell for cell in self.able if cell in self.costs.dollars]
        self._cells_of: dict[int, list[Cell]] = {}
        for cell in self.able:
            self._cells_of.setdefault(cell[0], []).append(cell)

    def find(self, former: Assignment | None, plays: float, known: Sequence[Assignment] = ()) -> Found:
        """The best assignment that at most `plays` plays find: descents from several, of which the better half go on.

        Descent stays in its valley, and the one in use may have become the wrong one. `known` are good assignments of
        earlier searches.
        """
        shapes = [Assignment(classes, (DEPTHS[0],) * self.count) for classes in self.shapes()]
        ends = self._best_of([*([former] if former is not None else []), *known, *shapes], RACE * plays)
        good = dict[object, Assignment]()
        while len(ends) > 1:
            ends = sorted((self.descend(end, ROUND * plays / len(ends)) for end in ends), key=self._score)
            good = {end.key: end for end in ends} | good
            ends = ends[: len(ends) // 2]
        best = self.descend(ends[0], plays - self.twin.plays, patient=self._lean)
        good = {best.key: best} | good
        before = self._play(former).score if former is not None else math.inf
        return Found(best, self._score(best), before, tuple(good.values())[:CONTENDERS])

    def _best_of(self, contenders: Iterable[Assignment], plays: float) -> list[Assignment]:
        """Those that descents begin at: the best placements, each under the rules that are best for it."""
        ranked = self._ranked(contenders, plays)[:CONTENDERS]
        ends = []
        for one in ranked:
            usual = tuple(self._usual_rule(one.classes, place) for place in range(self.count))
            for rules in (usual, *((depth,) * self.count for depth in DEPTHS)):
                other = replace(one, rules=rules)
                one = min(one, other, key=lambda each: self._play(each, self._played[one.key]).score)
            ends.append(one)
        return sorted(ends, key=self._score)

    def _score(self, assignment: Assignment) -> float:
        return self._played[assignment.key].score

    def _ranked(self, contenders: Iterable[Assignment], plays: float) -> list[Assignment]:
        """The best one of each placement, best first, but for those that no descent will make good."""
        best: Played | None = None
        placed: dict[object, Assignment] = {}
        for contender in contenders:
            if best is not None and self.twin.plays > plays:
                break
            played = self._play(contender, best, ROUGH)
            if best is None or played.score < best.score:
                best = played
            if played.score < math.inf:
                same = placed.setdefault(contender.key[0], contender)
                placed[contender.key[0]] = min(same, contender, key=self._score)
        return sorted(placed.values(), key=self._score)

    def shapes(self) -> Sequence[Classes]:
        """Placements to begin with: whole models or cells by price, the same without a class, and what operators do."""
        every = set(range(self.count))
        cheapest = [self._by_price(every, whole=whole) for whole in (True, False)]
        used = sorted(set(cheapest[0].values()) | set(cheapest[1].values()))
        without = [self._by_price(every - {place}, whole=whole) for whole in (True, False) for place in used]
        found = [*cheapest, self.by_model(), self.by_speed(), *without]
        return list({tuple(classes.values()): classes for classes in found}.values())

    def by_model(self) -> Classes:
        """All work of a model on the class where its device seconds cost least, of those that all of it may use."""
        return {cell: min(self._options(self._cells_of[cell[0]], set()), key=itemgetter(1, 2))[2] for cell in self.able}

    def by_speed(self) -> Classes:
        """Live work on its fastest class, other work on its cheapest; the first class where nothing is known."""
        figures = {cell: self.costs.alone if cell[1] == LIVE else self.costs.dollars for cell in self._cells}
        return {
            cell: min(places, key=lambda place: figures[cell][cell][place] if cell in figures else place)
            for cell, places in self.able.items()
        }

    def _by_price(self, allowed: set[int], *, whole: bool) -> Classes:
        """Each cell, or `whole` models, on the cheapest of these classes that has the jobs in time.

        No class gets more models than a device of it can hold, as long as others can: those that gain most come first.
        """
        groups = list(self._cells_of.values()) if whole else [[cell] for cell in self.able]
        ranked = [self._options(cells, allowed) for cells in groups]
        room = [device.memory * USABLE for device in self._fleet.classes.values()]
        has, classes = set[Cell](), dict[Cell, int]()
        for cells, options in sorted(zip(groups, ranked, strict=True), key=lambda one: _regret(one[1])):
            model = cells[0][0]
            sizes = {place: 0.0 if (model, place) in has else self._memory(model, place) for *_, place in options}
            place = next((place for place in sizes if sizes[place] <= room[place]), options[0][2])
            room[place] -= sizes[place]
            has.add((model, place))
            classes |= dict.fromkeys(cells, place)
        return {cell: classes[cell] for cell in self.able}

    def _memory(self, model: int, place: int) -> float:
        timing = self._fleet.timings[self.twin.window.workload.trace.models[model]][place]
        return timing.memory if timing is not None else 0.0

    def _options(self, cells: Sequence[Cell], allowed: set[int]) -> list[Option]:
        """These classes, or all, for cells of one model, best first: where they are in time if they are anywhere."""
        places = set.intersection(*(set(self.able[cell]) for cell in cells))
        places = places & allowed or places
        known, timely = [cell for cell in cells if cell in self.costs.dollars], self.costs.timely
        enough = {cell: TIMELY * max(timely[cell][place] for place in places) for cell in known}
        late = {place: sum(timely[cell][place] < enough[cell] for cell in known) for place in places}
        return sorted((late[place], sum(self.costs.dollars[cell][place] for cell in known), place) for place in places)

    def _usual_rule(self, classes: Mapping[Cell, int], place: int) -> ScalingRule:
        """The rule that keeps a class's devices for the work that there was, although it scales on predictions."""
        mine = [cell for cell in self._cells if classes[cell] == place]
        done = sum(self.twin.work[cell][place] for cell in mine)
        expected = sum(self.twin.expected[cell][place] for cell in mine)
        target = TARGET * expected / done if done else TARGET
        densities = [rule for rule in RULES if isinstance(rule, Density)]
        return min(densities, key=lambda rule: abs(rule.target - target))

    def descend(self, start: Assignment, plays: float, *, patient: bool = False) -> Assignment:
        """Take each change that is better, until none is or the plays are used up.

        First models move, those with most requests first; then all changes follow. What failed is not tried again
        before all else was, although the assignment has changed since. A `patient` one then plays to the end what ended
        early.
        """
        played, best, limit, hopeless = self._play(start), start, self.twin.plays + plays, CLOSE
        while True:
            better = False
            for change in chain(self._models(best), self._changes(best, self._late(played))):
                if self.twin.plays >= limit:
                    return best
                new = self._changed(best, change)
                if self._knows(new, hopeless):
                    continue
                result = self._play(new, played, hopeless)
                if result.score < played.score * BETTER:
                    best, played, better = new, result, True
            if not better and (hopeless == PATIENT or not patient):
                return best
            hopeless = CLOSE if better else PATIENT

    def _changed(self, now: Assignment, change: Change) -> Assignment:
        """The assignment with a change. A class that was not in use gets the rule that is usual for what it has now."""
        new = change.of(now)
        begun = new.used() - now.used() if self._lean else set()
        return replace(new, rules=ruled(new.rules, {place: self._usual_rule(new.classes, place) for place in begun}))

    def _knows(self, assignment: Assignment, hopeless: float) -> bool:
        """Whether it was played; for a patient search, to its end."""
        known = self._played.get(assignment.key)
        return known is not None and (known.score < math.inf or hopeless < PATIENT)

    def _play(self, assignment: Assignment, best: Played | None = None, hopeless: float = HOPELESS) -> Played:
        """Play an assignment: once, unless the play ended early and its end is needed."""
        if not self._knows(assignment, PATIENT if best is None else hopeless):
            self._played[assignment.key] = self.twin.play(assignment, best, hopeless)
        return self._played[assignment.key]

    def _closes(self, now: Assignment, place: int) -> bool:
        """Whether every cell of a class has another one in use."""
        rest = now.used() - {place}
        return all(rest & set(self.able[cell]) for cell in self._cells if now.classes[cell] == place)

    def _late(self, played: Played) -> Mapping[Cell, float]:
        """What each cell's late requests cost, in US dollars an hour."""
        late, penalties = {}, self._fleet.penalties
        for cell in self._cells:
            timely = played.timely[self.twin.rows[cell]]
            missed = int((~timely).sum())
            late[cell] = penalties[cell[1]] * self.costs.share[cell] * missed / len(timely)
            if cell[1] == LIVE:
                late[cell] += starving(missed, len(timely), penalties)
        return late

    def _models(self, now: Assignment) -> Iterator[Change]:
        """What of a model shares a class with its live work goes to another one, those with most requests first."""
        requests = Counter(job.model for job in self.twin.window.jobs)
        for model, _ in requests.most_common():
            place = now.classes[self._cells_of[model][0]]
            cells = [cell for cell in self._cells_of[model] if now.classes[cell] == place]
            for _, _, other in sorted(self._options(cells, set()), key=itemgetter(1, 2)):
                yield Change(dict.fromkeys(cells, other), {}, 0.0)

    def _changes(self, now: Assignment, late: Mapping[Cell, float]) -> Sequence[Change]:
        """All single changes in random order, heavier ones first more often (Efraimidis and Spirakis, 2006)."""
        changes = [*self._other_classes(now, late), *self._other_rules(now, late), *self._classes_in_use(now)]
        least = LEAST * fmean(change.gain for change in changes) or 1.0
        weights = [change.often * (change.gain + least) for change in changes]
        keyed = [(self._random.random() ** (1 / weight), n) for n, weight in enumerate(weights)]
        return [changes[n] for _, n in sorted(keyed, reverse=True)]

    def _other_classes(self, now: Assignment, late: Mapping[Cell, float]) -> Iterator[Change]:
        """A cell goes to another class, or a model's live and standard work together, or all of it.

        The class that it leaves scales as before, or has fewest devices.
        """
        groups, used, devices = [[cell] for cell in self._cells], now.used(), list(self._fleet.classes.values())
        for model in self._cells_of:
            mine = [cell for cell in self._cells if cell[0] == model]
            groups += [few for few in (mine, [cell for cell in mine if cell[1] <= STANDARD]) if len(few) > 1]
        for cells in groups:
            for place in set.intersection(*(set(self.able[cell]) for cell in cells)):
                gain = sum(self._gain(cell, now, place) + late[cell] for cell in cells)
                often = (WHOLE if len(cells) > 1 else 1.0) * (1.0 if place in used else UNUSED)
                left = {now.classes[cell] for cell in cells} - {place}
                if left:
                    yield Change(dict.fromkeys(cells, place), {}, gain, often)
                if left and self._lean:
                    saved = sum(3600 * devices[was].usd_per_second for was in left)
                    yield Change(dict.fromkeys(cells, place), dict.fromkeys(left, FEWEST), gain + saved, often)

    def _gain(self, cell: Cell, now: Assignment, place: int) -> float:
        """US dollars an hour that a cell's jobs cost less on a class, if they are in time there."""
        dollars, timely, was = self.costs.dollars[cell], self.costs.timely[cell], now.classes[cell]
        return max(dollars[was] - dollars[place], 0.0) if timely[place] >= TIMELY * timely[was] else 0.0

    def _other_rules(self, now: Assignment, late: Mapping[Cell, float]) -> Iterator[Change]:
        """A class scales by another rule, or all do."""
        costs = dict.fromkeys(now.used(), 0.0)
        for cell in self._cells:
            place = now.classes[cell]
            costs[place] += self.costs.dollars[cell][place] + late[cell]
        for rule in RULES:
            for place, cost in costs.items():
                yield Change({}, {place: rule}, cost / len(RULES))
            yield Change({}, dict.fromkeys(costs, rule), sum(costs.values()) / len(RULES))

    def _classes_in_use(self, now: Assignment) -> Iterator[Change]:
        """A class is given up, or taken for all cells that are cheaper there."""
        used, total = now.used(), sum(self.costs.dollars[cell][now.classes[cell]] for cell in self._cells)
        for place in range(self.count):
            if place in used and self._closes(now, place):
                mine = [cell for cell in self._cells if now.classes[cell] == place]
                yield Change({cell: self._options([cell], used - {place})[0][2] for cell in mine}, {}, 0.1 * total)
            better = [cell for cell in self._cells if place in self.able[cell] and self._gain(cell, now, place)]
            if better:
                gain = sum(self._gain(cell, now, place) for cell in better)
                yield Change(dict.fromkeys(better, place), {}, gain)


def _regret(options: Sequence[Option]) -> tuple[float, float]:
    """How much worse the second class is than the first, most first."""
    if len(options) == 1:
        return (-math.inf, 0.0)
    (late, usd, _), (later, more, _) = options[:2]
    return (late - later, usd - more)


@dataclass(frozen=True, slots=True)
class Costs:
    """By cell and class: mean seconds of a job `alone`, `dollars` an hour, and the share `timely` at half speed.

    `share` is the cell's part of its service's requests.
    """

    share: Mapping[Cell, float]
    alone: Mapping[Cell, Sequence[float]]
    dollars: Mapping[Cell, Sequence[float]]
    timely: Mapping[Cell, Sequence[float]]

    @classmethod
    def of(cls, window: Window) -> Costs:
        """The costs of a window's jobs."""
        trace, fleet = window.workload.trace, window.workload.fleet
        alone, work, _ = figures_of(trace, fleet, trace.output)
        usd = np.array([device.usd_per_second for device in fleet.classes.values()])
        tariffs = [device.price.tariff for device in fleet.classes.values()]
        share, mean, dollars, timely = {}, {}, {}, {}
        for cell in sorted({(job.model, job.service) for job in window.jobs}):
            of_service = trace.service == cell[1]
            mine = of_service & (trace.model == cell[0])
            seconds = alone[mine]
            share[cell] = float(mine.sum() / of_service.sum())
            mean[cell] = seconds.mean(axis=0).tolist()
            tokens = Tokens(input=int(trace.size[mine].sum()), output=int(trace.output[mine].sum()))
            bills = [0.0 if tariff is None else tariff.bill(tokens, int(mine.sum())) for tariff in tariffs]
            seconds_used = work[mine].sum(axis=0)  # infinite where it cannot run, whatever that costs
            charged = np.multiply(seconds_used, usd, out=seconds_used.copy(), where=np.isfinite(seconds_used))
            dollars[cell] = ((charged + bills) * 3600 / window.span).tolist()
            timely[cell] = (seconds * SLACK <= trace.deadline[mine][:, None]).mean(axis=0).tolist()
        return cls(share, mean, dollars, timely)


def ruled(rules: Rules, others: Mapping[int, ScalingRule]) -> Rules:
    """The rules of all classes, with those of some by their places."""
    return tuple(others.get(place, rule) for place, rule in enumerate(rules))


def moved(now: Assignment, moves: Mapping[Cell, int]) -> Assignment:
    """The assignment with some cells on other classes."""
    return replace(now, classes={**now.classes, **moves})


def fresh(fleet: Fleet) -> tuple[int, ...]:
    """The devices that are on when a trace begins."""
    return tuple(max(device.initial, device.minimum) for device in fleet.classes.values())
