"""Which jobs move to another hardware class, and why: rescue, save, balance.

A placement is an estimate made at submission; each tick recomputes the same figures for what still waits. Only the jobs
that a queue serves last are considered: those ahead of them are taken soon, and the cost does not grow with queue
depth. Running jobs that can yield move by the same rules, at the price of what they repeat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from router.decide.candidates import CandidateTable
from router.decide.classify import LEAVING, Candidate, Needs
from router.decide.cost import GroupNeeds, blocks_for, dearest, estimate_figures, limits_of, wait_of
from router.decide.moves.preempt import SWITCH
from router.decide.placement import reserved_and_busy
from tasks.topology import Rebalance
from taxiway.contract.keys import LEVELS

CHEAPER = 0.85
"""Save: a move must cost less than this share (more than 15 % cheaper).

Balance: a move may cost no more than its inverse."""

Rows = np.ndarray
"""float64 or bool of shape (groups, candidates), or (groups, 1) for a property of the group itself."""

Route = tuple[str, str]
"""(source class, target class)."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Similar jobs of one queue: same model, level and size, with deadlines close together.

    `jobs` are those that may move, in serving order. `here` is the index of their class and variant on `table`. `ahead`
    is the device seconds served before the last of them. The deadline in `needs` is the time remaining.
    """

    table: CandidateTable
    needs: Needs
    here: int
    ahead: float
    jobs: tuple[str, ...]
    repeats: float | None = None
    """Of a running job: seconds that its next run would repeat. Its `needs` are those of that run."""
    kind: str = ""
    """That of the devices that can go on from its checkpoint; empty for any."""

    @property
    def source(self) -> str:
        """The class whose queue they wait in, or that runs them."""
        return self.table.candidates[self.here].hardware_class

    @property
    def left(self) -> float:
        """Seconds until they are due; infinite without a deadline."""
        return math.inf if self.needs.deadline is None else self.needs.deadline


@dataclass(slots=True, eq=False)
class View:
    """Figures of groups on one candidate table at an instant.

    Elsewhere, a group stands at the end of its level; at home, at its own place.
    """

    table: CandidateTable
    here: tuple[np.ndarray, np.ndarray]
    """The indices of each group's present candidate."""
    # Seconds and US dollars that are left of deadline and budget
    left: Rows
    affordable: Rows
    # As `EstimateColumns`, a row for each group
    residual: Rows
    work: Rows
    cost: Rows
    dearest: Rows
    wait: Rows
    finish: Rows
    at_most: Rows

    @property
    def in_time(self) -> Rows:
        """Where the groups are sure to be in time, within their budget."""
        meets: Rows = (self.dearest <= self.affordable) & (self.at_most <= self.left)
        return meets

    @property
    def in_time_here(self) -> Rows:
        """Whether each group is sure to be in time where it waits; False without a live device there."""
        meets: Rows = self.table.live[self.here[1]] & (self.at_most[self.here] <= self.left)
        return meets


class GroupBlock:
    """Groups on one table with the same rows per job, with all figures that do not depend on the work ahead."""

    def __init__(self, groups: Sequence[Group], closed: frozenset[Route]) -> None:
        table, needs = groups[0].table, [group.needs for group in groups]
        self.table = table
        self.level = np.array([each.level for each in needs], dtype=np.intp)
        self.home = table.queue[[group.here for group in groups]]
        self.allowed = np.array([_allowed_targets(group, closed) for group in groups])
        self._each = np.arange(len(groups))
        self._here = np.array([[group.here] for group in groups], dtype=np.intp)
        self._left = np.array([[group.left] for group in groups])
        self._affordable = np.array([[each.affordable] for each in needs])
        self.reserved = bool(table.reserved.any())
        self._ahead = np.array([group.ahead for group in groups])
        self._unserved = np.where(table.live[self._here[:, 0]], 0.0, math.inf)
        size, output, longest, payload, most_read = (
            np.array([[getattr(each, name)] for each in needs])
            for name in ("size", "output", "longest", "payload", "most_read")
        )
        workload = GroupNeeds(needs[0].rows, size, output, longest, payload, most_read, self.level)
        nothing = np.zeros((len(groups), len(table.classes)))
        idle = estimate_figures(table, workload, nothing)
        self._limits = None if table.allowed is None else limits_of(table.allowed, workload, idle.work)
        self._work, self._cost = idle.work, idle.cost
        self._idle = idle.finish - wait_of(table, nothing, self._limits)
        for row, group in enumerate(groups):
            if group.repeats is not None:
                _go_on((self._idle[row], self._work[row], self._cost[row]), group.here, group.repeats)
        self._dearest = dearest(table, workload, idle.cost)
        self._planned = _planned_targets(table, self._here[:, 0], blocks_for(table, workload))
        self._residual = table.residual[self.level]

    def open_to(self, kind: Kind, rows: slice) -> Rows:
        """Where moves of this kind may take the groups: under a plan, only where they do not undo it."""
        if self._planned is None:
            return self.allowed[rows]
        open_now: Rows = self.allowed[rows] & self._planned[kind is Kind.RESCUE][rows]
        return open_now

    def view(self, before: np.ndarray, rows: slice = slice(None)) -> View:
        """The groups' figures with `before` device seconds ahead of a new job, shape (LEVELS, classes)."""
        level, home = self.level[rows], self.home[rows]
        ahead, each = before[level], self._each[: len(level)]
        ahead[each, home] = np.minimum(self._ahead[rows], ahead[each, home]) + self._unserved[rows]
        limits = self._limits
        wait = wait_of(self.table, ahead, None if limits is None else (limits[0][:, rows], limits[1][:, rows]))
        finish, residual = self._idle[rows] + wait, self._residual[rows]
        return View(
            table=self.table,
            here=(each[:, None], self._here[rows]),
            left=self._left[rows],
            affordable=self._affordable[rows],
            residual=residual,
            work=self._work[rows],
            cost=self._cost[rows],
            dearest=self._dearest[rows],
            wait=wait,
            finish=finish,
            at_most=(finish + self.table.beyond) * residual,
        )


def _go_on(figures: tuple[np.ndarray, np.ndarray, np.ndarray], here: int, repeats: float) -> None:
    """Correct a running job's figures, shape (candidates,): at home it repeats nothing, elsewhere it yields first."""
    idle, work, cost = figures
    share = max(1.0 - repeats / max(float(idle[here]), 1e-9), 0.0)
    idle[here] = share * idle[here] - SWITCH
    idle += SWITCH
    work[here] *= share
    cost[here] *= share


def _planned_targets(table: CandidateTable, here: np.ndarray, alone: Rows) -> tuple[Rows, Rows] | None:
    """Where groups may move under a plan: in general, and to be rescued; None without a plan.

    They move to their preferred class. What would be late there may be rescued where it does not hold up planned work,
    and what no device serves anywhere.
    """
    guide = table.guide
    if guide is None:
        return None
    back = guide.preferred & ~guide.preferred[here][:, None]
    return back, guide.preferred | (alone <= guide.spill) | ~table.live[here][:, None]


def _allowed_targets(group: Group, closed: frozenset[Route]) -> np.ndarray:
    """The candidates that the group may move to: those with live devices, because no move is worth starting one."""
    source, candidates = group.source, group.table.candidates
    names = [candidate.hardware_class for candidate in candidates if candidate.devices]
    fit = {name for name in names if name != source and (source, name) not in closed}
    return np.array([candidate.hardware_class in fit and _goes_on(group, candidate) for candidate in candidates])


def _goes_on(group: Group, candidate: Candidate) -> bool:
    """Whether the candidate has devices, all of the kind that the group's checkpoint needs."""
    kinds = {device.kind for device in candidate.devices}
    return bool(kinds) and (not group.kind or kinds == {group.kind})


class Kind(StrEnum):
    """Why a job moves, in the order that a tick considers it."""

    RESCUE = "rescue"
    SAVE = "save"
    BALANCE = "balance"


@dataclass(frozen=True, slots=True)
class Move:
    """Jobs that move from one class's queue to another's."""

    kind: Kind
    source: str
    target: str
    variant: str
    """The variant that runs them there."""
    level: int
    jobs: tuple[str, ...]
    work: float
    """Device seconds of each job there."""
    cost: float
    """US dollars of each job there."""
    reason: str


@dataclass(slots=True)
class Flows:
    """Recent directions of moves, kept between ticks so that none is reversed at once."""

    tick: int = 0
    last: dict[Route, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Start a tick."""
        self.tick += 1

    def note(self, moves: Iterable[Move]) -> None:
        """Record the moves of this tick."""
        self.last.update({(move.source, move.target): self.tick for move in moves})

    def closed(self, ticks: int) -> frozenset[Route]:
        """The directions that would reverse a move of the last `ticks` ticks."""
        return frozenset((target, source) for (source, target), at in self.last.items() if self.tick - at <= ticks)


def rebalance(
    groups: Sequence[Group],
    work: Mapping[str, Sequence[float]],
    depths: Mapping[str, int],
    rules: Rebalance,
    closed: frozenset[Route] = frozenset(),
) -> list[Move]:
    """The moves of one tick, in the order to make them. No job is in two of them.

    Args:
        groups: the jobs that each queue serves last, in any order, on candidate tables with the same classes.
        work: device seconds queued and running in each class, one figure per level.
        depths: waiting jobs in each class.
        rules: the limits.
        closed: directions (source, target) that are not allowed.
    """
    return list(_Tick(groups, work, depths, rules, closed).moves()) if groups else []


class _Tick:
    """State of one tick: the work ahead in every class, updated as moves are decided one after another."""

    def __init__(
        self,
        groups: Sequence[Group],
        work: Mapping[str, Sequence[float]],
        depths: Mapping[str, int],
        rules: Rebalance,
        closed: frozenset[Route],
    ) -> None:
        classes = groups[0].table.classes
        self._row = {name: row for row, name in enumerate(classes)}
        each = np.array([[*work.get(name, ()), *[0.0] * LEVELS][:LEVELS] for name in classes])
        self._before = each.cumsum(axis=1).T.copy()  # device seconds before a new job, by level and class
        self._groups = sorted(groups, key=lambda one: (one.left, one.needs.level, one.jobs[0] if one.jobs else ""))
        self._jobs = [group.jobs for group in self._groups]
        self._rules = rules
        self._share = {name: int(depth * rules.max_share_per_tick) for name, depth in depths.items()}
        self._left = dict(depths)
        self._slack = np.full((len(classes), LEVELS), math.inf)
        blocks: dict[tuple[int, int], list[int]] = {}
        for place, group in enumerate(self._groups):
            blocks.setdefault((id(group.table), group.needs.rows), []).append(place)
        self._blocks = [(GroupBlock([self._groups[p] for p in places], closed), places) for places in blocks.values()]
        self._positions = {p: (block, row) for block, places in self._blocks for row, p in enumerate(places)}
        for block, _ in self._blocks:
            self._limit_slack(block)

    def moves(self) -> Iterator[Move]:
        """The moves of each kind, by urgency."""
        for kind in Kind:
            for place in self._helped_groups(kind):
                move = self._consider(kind, place)
                if move is not None:
                    yield move

    def _helped_groups(self, kind: Kind) -> list[int]:
        """The groups that a move of this kind would help, before any such move is made."""
        found: list[int] = []
        for block, places in self._blocks:
            wanted = self._wanted(kind, block, block.view(self._before), slice(None))
            found += (places[row] for row in np.flatnonzero(wanted.any(axis=1)).tolist())
        return sorted(found)

    def _wanted(self, kind: Kind, block: GroupBlock, view: View, rows: slice) -> Rows:
        wanted: Rows = WANTED[kind](view, self._rules) & block.open_to(kind, rows)
        return wanted & ~reserved_and_busy(block.table, self._before[-1:].T) if block.reserved else wanted

    def _consider(self, kind: Kind, place: int) -> Move | None:
        """The move of this kind that helps one group; None if none does any more."""
        group, free = self._groups[place], len(self._jobs[place])
        free = min(free, self._left.get(group.source, 0))
        if free <= 0:
            return None
        block, row = self._positions[place]
        view = block.view(self._before, slice(row, row + 1))
        wanted = np.flatnonzero(self._wanted(kind, block, view, slice(row, row + 1))).tolist()
        if not wanted:
            return None
        finish = view.finish[0].tolist()
        best = finish if kind is Kind.BALANCE else view.cost[0].tolist()
        to = min(wanted, key=lambda i: (best[i], finish[i], i))
        most = max(self._share[group.source], self._jobs_to_stay_busy(view, to))
        count = min(free, most, _COUNT[kind](view, group.here, to), self._capacity(group, view, to))
        return self._move(kind, place, view, to, count) if count > 0 else None

    def _limit_slack(self, block: GroupBlock) -> None:
        """Bound the work that may be added ahead of groups in time.

        Moved jobs go behind their own level, so only the levels above count.
        """
        view = block.view(self._before)
        live = view.table.live[view.here[1]]
        left = np.where(live, view.left, -math.inf)[:, 0] - np.where(live, view.at_most[view.here], 0.0)[:, 0]
        bound = left / view.residual[view.here][:, 0] * block.table.servers[view.here[1][:, 0]]
        for level in range(LEVELS):
            kept = (left >= 0) & (block.level > level)
            np.minimum.at(self._slack[:, level], block.home[kept], bound[kept])

    def _jobs_to_stay_busy(self, view: View, to: int) -> int:
        """Jobs that keep the target busy until the tick after next; with fewer it would idle."""
        free = 2 * self._rules.tick - float(view.wait[0, to])
        return 1 + _whole_jobs(free * view.table.servers[to] / view.work[0, to])

    def _capacity(self, group: Group, view: View, to: int) -> int:
        """Jobs that the target's queue can take before one that is in time there becomes late."""
        slack = self._slack[group.table.queue[to], group.needs.level]
        return _whole_jobs(slack / view.work[0, to])

    def _move(self, kind: Kind, place: int, view: View, to: int, count: int) -> Move:
        group, jobs = self._groups[place], self._jobs[place]
        table, level, work = group.table, group.needs.level, float(view.work[0, to])
        self._jobs[place] = jobs[:-count]
        self._left[group.source] -= count
        self._share[group.source] = max(0, self._share[group.source] - count)
        row, added = table.queue[to], count * work
        self._before[level:, row] += added
        self._before[level:, self._row[group.source]] -= count * float(view.work[0, group.here])
        self._slack[row] -= added
        left = group.left - float(view.at_most[0, to]) - added
        if left >= 0:
            above = self._slack[row, :level]
            np.minimum(above, left / table.residual[level, to] * table.servers[to], out=above)
        target = table.candidates[to]
        return Move(
            kind=kind,
            source=group.source,
            target=target.hardware_class,
            variant=target.variant_name,
            level=level,
            jobs=jobs[-count:],
            work=work,
            cost=float(view.cost[0, to]),
            reason=_reason(kind, group, view, to),
        )


def _late_here(view: View, rules: Rebalance) -> Rows:
    """Rescue: where the group is sure to be in time, while in its present class it is not."""
    late: Rows = view.in_time & ~view.in_time_here
    return late


def _earlier_there(view: View, rules: Rebalance) -> Rows:
    """Balance: where it would be answered much earlier.

    It must cost about the same, or be affordable if the group might be late here. Work that would be late there too
    stays: it is dropped at its deadline, and would only take time from others.
    """
    finish, cost = view.finish[view.here], view.cost[view.here]
    as_good = view.in_time & (view.cost * CHEAPER <= cost)
    last_hope = (view.dearest <= view.affordable) & (view.finish <= view.left) & ~view.in_time_here
    latest = np.minimum(finish - 2 * rules.move_cost, finish * (1 - rules.min_gain))
    earlier: Rows = (as_good | last_hope) & (view.finish + view.work / view.table.servers < latest)
    return earlier


def _cheaper_there(view: View, rules: Rebalance) -> Rows:
    """Save: where it is also sure to be in time, on clearly cheaper hardware."""
    cheaper: Rows = view.in_time & (view.cost < CHEAPER * view.cost[view.here]) & view.in_time_here
    return cheaper


WANTED = {Kind.RESCUE: _late_here, Kind.BALANCE: _earlier_there, Kind.SAVE: _cheaper_there}
"""Where each kind of move would take groups: shape (groups, candidates)."""


def _most_in_time(view: View, here: int, to: int) -> int:
    """Jobs that can move before the last of them is no longer sure to be in time."""
    left = (view.left[0, 0] - view.at_most[0, to]) / view.residual[0, to]
    return 1 + _whole_jobs(left * view.table.servers[to] / view.work[0, to])


def _fewest_to_rescue(view: View, here: int, to: int) -> int:
    """Jobs that must move so that the last remaining one is in time; at most as many as are in time there."""
    meet = _most_in_time(view, here, to)
    if not view.table.live[here]:
        return meet
    late = (view.at_most[0, here] - view.left[0, 0]) / view.residual[0, here]
    return min(1 + _whole_jobs(late * view.table.servers[here] / view.work[0, here]), meet)


def _most_to_level(view: View, here: int, to: int) -> int:
    """Jobs after which the last one would be answered at the same time here and there."""
    one = view.work[0] / view.table.servers
    return _whole_jobs((view.finish[0, here] - view.finish[0, to]) / (one[here] + one[to]))


_COUNT = {Kind.RESCUE: _fewest_to_rescue, Kind.BALANCE: _most_to_level, Kind.SAVE: _most_in_time}


def _whole_jobs(jobs: float) -> int:
    return int(min(max(jobs, 0.0), 1e9))


def _reason(kind: Kind, group: Group, view: View, to: int) -> str:
    here, finish, cost, sure = group.here, view.finish[0].tolist(), view.cost[0].tolist(), view.at_most[0].tolist()
    if not group.table.live[here]:
        why = LEAVING if group.table.candidates[here].absent == LEAVING else f"no device of {group.source} is live"
        return f"{kind}: {why}; expected in {finish[to]:.3g} s"
    if kind is Kind.RESCUE:
        left = f"{group.needs.deadline:.3g} s left"
        return f"rescue: at most {sure[to]:.3g} s, {sure[here]:.3g} s on {group.source}; {left}"
    if kind is Kind.BALANCE:
        return f"balance: expected in {finish[to]:.3g} s, {finish[here]:.3g} s on {group.source}"
    return f"save: {cost[to]:.3g} USD, {cost[here]:.3g} on {group.source}"
