"""Waiting jobs that are alike, reckoned together: a tick has hundreds of groups, and each is one row of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.decide.candidates import CandidateTable, Column
from router.decide.classify import Needs
from router.decide.cost import reckon, wait_of

Rows = np.ndarray
"""float64 or bool of shape (groups, candidates), or (groups, 1) for what is a group's own."""

Way = tuple[str, str]
"""The class that jobs leave, and the one that they go to."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Jobs of one queue that are alike: of one model, level and size, due at about the same time.

    `jobs` are those that may move, served first to last; `here` is the place of their class and variant on `candidate
    table`, and `ahead` the device seconds that are served before the last of them. The deadline in `needs` is what is
    left of it.
    """

    table: CandidateTable
    needs: Needs
    here: int
    ahead: float
    jobs: tuple[str, ...]

    @property
    def source(self) -> str:
        """The class whose queue they wait in."""
        return self.table.candidates[self.here].hardware_class

    @property
    def left(self) -> float:
        """Seconds until they are due; infinite where they have no deadline."""
        return math.inf if self.needs.deadline is None else self.needs.deadline


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The needs of several groups as `reckon` reads them: columns of shape (groups, 1), `level` of shape (groups,)."""

    rows: int
    size: Column
    payload: Column
    level: np.ndarray
    company: int = 0


@dataclass(slots=True, eq=False)
class View:
    """Groups on one candidate table at an instant: as the last of their level elsewhere, and where they stand at home.

    `left` and `affordable` are what deadline and budget leave. `here` picks what is true where each group waits.
    """

    table: CandidateTable
    here: tuple[np.ndarray, np.ndarray]
    left: Rows
    affordable: Rows
    residual: Rows
    work: Rows
    cost: Rows
    wait: Rows
    finish: Rows
    guaranteed: Rows

    @property
    def in_time(self) -> Rows:
        """Where the groups are surely in time, within their budget."""
        meets: Rows = (self.cost <= self.affordable) & (self.guaranteed <= self.left)
        return meets

    @property
    def in_time_here(self) -> Rows:
        """Whether each is surely in time where it waits: never without a live device there."""
        meets: Rows = self.table.live[self.here[1]] & (self.guaranteed[self.here] <= self.left)
        return meets


class Block:
    """Groups on one table, of as many rows a job, with all of their figures that do not depend on what is ahead."""

    def __init__(self, groups: Sequence[Group], closed: frozenset[Way]) -> None:
        table, needs = groups[0].table, [group.needs for group in groups]
        self.table = table
        self.level = np.array([each.level for each in needs], dtype=np.intp)
        self.home = table.queue[[group.here for group in groups]]
        self.away = np.array([_away(group, closed) for group in groups])
        self._each = np.arange(len(groups))
        self._here = np.array([[group.here] for group in groups], dtype=np.intp)
        self._left = np.array([[group.left] for group in groups])
        self._affordable = np.array([[each.affordable] for each in needs])
        self.reserved = bool(table.reserved.any())
        self._ahead = np.array([group.ahead for group in groups])
        self._gone = np.where(table.live[self._here[:, 0]], 0.0, math.inf)
        size, payload = np.array([[each.size] for each in needs]), np.array([[each.payload] for each in needs])
        idle = reckon(table, Asked(needs[0].rows, size, payload, self.level), np.zeros(len(table.classes)))
        self._work, self._cost, self._idle = idle.work, idle.cost, idle.finish
        self._residual = table.residual[self.level]

    def look(self, before: np.ndarray, rows: slice = slice(None)) -> View:
        """These groups with so many device seconds before a new job of each level, shape (LEVELS, classes)."""
        level, home = self.level[rows], self.home[rows]
        ahead, each = before[level], self._each[: len(level)]
        ahead[each, home] = np.minimum(self._ahead[rows], ahead[each, home]) + self._gone[rows]
        wait = wait_of(self.table, ahead)
        finish, residual = self._idle[rows] + wait, self._residual[rows]
        return View(
            table=self.table,
            here=(each[:, None], self._here[rows]),
            left=self._left[rows],
            affordable=self._affordable[rows],
            residual=residual,
            work=self._work[rows],
            cost=self._cost[rows],
            wait=wait,
            finish=finish,
            guaranteed=finish * residual,
        )


def _away(group: Group, closed: frozenset[Way]) -> np.ndarray:
    """The candidates that the group may go to at all: where devices are, for no move is worth the start of one."""
    source, candidates = group.source, group.table.candidates
    names = [candidate.hardware_class for candidate in candidates if candidate.devices]
    fit = {name for name in names if name != source and (source, name) not in closed}
    return np.array([candidate.hardware_class in fit and bool(candidate.devices) for candidate in candidates])
