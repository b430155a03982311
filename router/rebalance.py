"""Which waiting jobs move to another hardware class, and why: rescue, save, balance (DESIGN §7).

A placement is a guess made at submit; each tick the same figures are reckoned anew for what still waits. Only the jobs
that a queue serves last are looked at: those ahead of them are soon taken, and a queue of any depth costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from router.board import Board
from router.classify import Needs
from router.cost import Figures, reckon
from router.placement import kept_back
from tasks.topology import Rebalance
from taxiway.keys import LEVELS

CHEAPER = 0.85
"""Work goes back to hardware that costs less than this share, and is levelled only where it costs no more than its
inverse (DESIGN §7: more than 15 % cheaper)."""


class Kind(StrEnum):
    """Why a job moves, in the order that a tick considers it."""

    RESCUE = "rescue"
    SAVE = "save"
    BALANCE = "balance"


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Jobs of one queue that are alike: of one model, level and size, due at about the same time.

    `jobs` are those that may move, served first to last; `here` is the place of their class and variant on `board`, and
    `ahead` the device seconds that are served before the last of them. The deadline in `needs` is what is left of it.
    """

    board: Board
    needs: Needs
    here: int
    ahead: float
    jobs: tuple[str, ...]

    @property
    def source(self) -> str:
        """The class whose queue they wait in."""
        return self.board.candidates[self.here].hardware_class


@dataclass(frozen=True, slots=True)
class Move:
    """Jobs that leave one class's queue for another's, with the variant that runs them there.

    `work` is the device seconds of each there, `cost` its US dollars.
    """

    kind: Kind
    source: str
    target: str
    variant: str
    level: int
    jobs: tuple[str, ...]
    work: float
    cost: float
    reason: str


@dataclass(slots=True)
class Flows:
    """Which way jobs went lately, so that none goes back at once: what a tick remembers of those before it."""

    tick: int = 0
    last: dict[tuple[str, str], int] = field(default_factory=dict)

    def begin(self) -> None:
        """A tick begins."""
        self.tick += 1

    def note(self, moves: Iterable[Move]) -> None:
        """Remember the moves of this tick."""
        self.last.update({(move.source, move.target): self.tick for move in moves})

    def closed(self, ticks: int) -> frozenset[tuple[str, str]]:
        """The ways that would undo a move of the last `ticks` ticks."""
        return frozenset((target, source) for (source, target), at in self.last.items() if self.tick - at <= ticks)


def rebalance(
    groups: Sequence[Group],
    work: Mapping[str, Sequence[float]],
    depths: Mapping[str, int],
    rules: Rebalance,
    closed: frozenset[tuple[str, str]] = frozenset(),
) -> list[Move]:
    """The moves of one tick, in the order to make them. No job is in two of them.

    Args:
        groups: the jobs that each queue serves last, in any order, on boards with the same classes.
        work: device seconds queued and running in each class, one figure a level.
        depths: waiting jobs in each class.
        rules: the bounds.
        closed: ways (source, target) that no job may go.
    """
    if not groups:
        return []
    tick = _Tick(groups, work, depths, rules, closed)
    return [move for kind in Kind for place in range(len(groups)) if (move := tick.consider(kind, place)) is not None]


class _Tick:
    """The ledger of one tick: what every class has before it, while moves are decided one after another."""

    def __init__(
        self,
        groups: Sequence[Group],
        work: Mapping[str, Sequence[float]],
        depths: Mapping[str, int],
        rules: Rebalance,
        closed: frozenset[tuple[str, str]],
    ) -> None:
        classes = groups[0].board.classes
        self._row = {name: row for row, name in enumerate(classes)}
        self._work = np.array([[*work.get(name, ()), *[0.0] * LEVELS][:LEVELS] for name in classes])
        self._groups = sorted(groups, key=_urgency)
        self._jobs = [group.jobs for group in self._groups]
        self._rules = rules
        self._closed = closed
        self._share = {name: int(depth * rules.max_share_per_tick) for name, depth in depths.items()}
        self._left = dict(depths)
        self._slack = np.full((len(classes), LEVELS), math.inf)
        for group in self._groups:
            self._keep_in_time(group)

    def consider(self, kind: Kind, place: int) -> Move | None:
        """The move of this kind that helps one group, by urgency; None where none does."""
        group, free = self._groups[place], len(self._jobs[place])
        free = min(free, self._left.get(group.source, 0))
        if free <= 0:
            return None
        figures = self._figures(group)
        wanted = _WANTED[kind](group, figures, self._rules) & self._open(group)
        if not wanted.any():
            return None
        best = figures.finish if kind is Kind.BALANCE else figures.cost
        to = min(np.flatnonzero(wanted).tolist(), key=lambda i: (best[i], figures.finish[i], i))
        most = max(self._share[group.source], self._served(group, figures, to))
        count = min(free, most, _COUNT[kind](group, figures, to), self._room(group, figures, to))
        return self._move(kind, place, figures, to, count) if count > 0 else None

    def _keep_in_time(self, group: Group) -> None:
        """Bound what may be served before a group that is in time: moves go behind its level, so those above count."""
        left = _limit(group.needs) - float(self._figures(group).guaranteed[group.here])
        self._bound(group.board, group.here, group.needs.level, left)

    def _bound(self, board: Board, index: int, level: int, left: float) -> None:
        if left >= 0:
            above = self._slack[board.queue[index], :level]
            np.minimum(above, left / board.residual[level, index] * board.servers[index], out=above)

    def _figures(self, group: Group) -> Figures:
        """The group's figures: as the last of its level elsewhere, and where it stands at home."""
        ahead = self._work[:, : group.needs.level + 1].sum(axis=1)
        home = self._row[group.source]
        ahead[home] = min(group.ahead, ahead[home]) if group.board.live[group.here] else math.inf
        return reckon(group.board, group.needs, ahead)

    def _open(self, group: Group) -> np.ndarray:
        """The candidates that the group may go to at all."""
        board, source = group.board, group.source
        away = [c.hardware_class != source and (source, c.hardware_class) not in self._closed for c in board.candidates]
        allowed: np.ndarray = board.live & np.array(away) & ~kept_back(board, self._work)
        return allowed

    def _served(self, group: Group, figures: Figures, to: int) -> int:
        """Jobs that keep the target busy until the tick after the next one: fewer would let it idle."""
        free = 2 * self._rules.tick - float(figures.wait[to])
        return 1 + _whole(free * group.board.servers[to] / figures.work[to])

    def _room(self, group: Group, figures: Figures, to: int) -> int:
        """Jobs that the target's queue can take before one that was in time there is not."""
        slack = self._slack[group.board.queue[to], group.needs.level]
        return _whole(slack / figures.work[to])

    def _move(self, kind: Kind, place: int, figures: Figures, to: int, count: int) -> Move:
        group, jobs = self._groups[place], self._jobs[place]
        board, level = group.board, group.needs.level
        self._jobs[place] = jobs[:-count]
        self._left[group.source] -= count
        self._share[group.source] = max(0, self._share[group.source] - count)
        added = count * float(figures.work[to])
        self._work[board.queue[to], level] += added
        self._work[self._row[group.source], level] -= count * float(figures.work[group.here])
        self._slack[board.queue[to]] -= added
        self._bound(board, to, level, _limit(group.needs) - float(figures.guaranteed[to]) - added)
        target = board.candidates[to]
        return Move(
            kind=kind,
            source=group.source,
            target=target.hardware_class,
            variant=target.variant_name,
            level=level,
            jobs=jobs[-count:],
            work=float(figures.work[to]),
            cost=float(figures.cost[to]),
            reason=_reason(kind, group, figures, to),
        )


def _late_here(group: Group, figures: Figures, rules: Rebalance) -> np.ndarray:
    """Rescue: where the group would surely be in time, while here it might not."""
    late: np.ndarray = _in_time(group, figures) & (not _in_time_here(group, figures))
    return late


def _earlier_there(group: Group, figures: Figures, rules: Rebalance) -> np.ndarray:
    """Balance: where it would be answered much earlier; for about the same price, unless it is late anyway."""
    here = group.here
    as_good = _in_time(group, figures) & (figures.cost * CHEAPER <= figures.cost[here])
    last_hope = (figures.cost <= group.needs.affordable) & (not _in_time_here(group, figures))
    there = figures.finish + figures.work / group.board.servers
    latest = min(figures.finish[here] - 2 * rules.move_cost, figures.finish[here] * (1 - rules.min_gain))
    earlier: np.ndarray = (as_good | last_hope) & (there < latest)
    return earlier


def _cheaper_there(group: Group, figures: Figures, rules: Rebalance) -> np.ndarray:
    """Save: where it would surely be in time, too, on clearly cheaper hardware."""
    cheaper: np.ndarray = _in_time(group, figures) & (figures.cost < CHEAPER * figures.cost[group.here])
    return cheaper & _in_time_here(group, figures)


_WANTED = {Kind.RESCUE: _late_here, Kind.BALANCE: _earlier_there, Kind.SAVE: _cheaper_there}


def _in_time(group: Group, figures: Figures) -> np.ndarray:
    meets: np.ndarray = (figures.cost <= group.needs.affordable) & (figures.guaranteed <= _limit(group.needs))
    return meets


def _in_time_here(group: Group, figures: Figures) -> bool:
    """Whether the group is surely in time where it waits: never without a live device there."""
    return bool(group.board.live[group.here] and figures.guaranteed[group.here] <= _limit(group.needs))


def _as_many_as_meet(group: Group, figures: Figures, to: int) -> int:
    """Jobs that can go before the last of them is not surely in time."""
    limit = _limit(group.needs)
    if math.isinf(limit):
        return len(group.jobs)
    left = (limit - figures.guaranteed[to]) / group.board.residual[group.needs.level, to]
    return 1 + _whole(left * group.board.servers[to] / figures.work[to])


def _as_many_as_are_late(group: Group, figures: Figures, to: int) -> int:
    """Jobs that must go before the last of those that stay is in time; no more than are in time there."""
    if not group.board.live[group.here]:
        return _as_many_as_meet(group, figures, to)
    residual = group.board.residual[group.needs.level, group.here]
    late = (figures.guaranteed[group.here] - _limit(group.needs)) / residual
    many = 1 + _whole(late * group.board.servers[group.here] / figures.work[group.here])
    return min(many, _as_many_as_meet(group, figures, to))


def _as_many_as_level(group: Group, figures: Figures, to: int) -> int:
    """Jobs after which the last would be answered at the same time here and there."""
    one = figures.work / group.board.servers
    return _whole((figures.finish[group.here] - figures.finish[to]) / (one[group.here] + one[to]))


_COUNT = {Kind.RESCUE: _as_many_as_are_late, Kind.BALANCE: _as_many_as_level, Kind.SAVE: _as_many_as_meet}


def _limit(needs: Needs) -> float:
    return math.inf if needs.deadline is None else needs.deadline


def _whole(jobs: float) -> int:
    return int(min(max(jobs, 0.0), 1e9))


def _urgency(group: Group) -> tuple[float, int, str]:
    return _limit(group.needs), group.needs.level, group.jobs[0] if group.jobs else ""


def _reason(kind: Kind, group: Group, figures: Figures, to: int) -> str:
    here, finish, cost, sure = group.here, figures.finish, figures.cost, figures.guaranteed
    if not group.board.live[here]:
        return f"{kind}: no device of {group.source} is live; expected in {finish[to]:.3g} s"
    if kind is Kind.RESCUE:
        left = f"{group.needs.deadline:.3g} s are left"
        return f"rescue: in {sure[to]:.3g} s at most, {sure[here]:.3g} s on {group.source}; {left}"
    if kind is Kind.BALANCE:
        return f"balance: expected in {finish[to]:.3g} s, {finish[here]:.3g} s on {group.source}"
    return f"save: {cost[to]:.3g} USD, {cost[here]:.3g} on {group.source}"
