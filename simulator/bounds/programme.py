"""A linear programme under construction: columns from `low` to `high` at least cost, with rows `sum <= most`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_matrix, csr_matrix

from simulator.traces.trace import Column
from simulator.traces.workload import Figures


@dataclass(frozen=True, slots=True)
class Solution:
    """What HiGHS proved and found in its time: no solution costs less than `bound`; `values` is the best one found.

    `gap` is the best one's cost over the bound, less one; infinite without any. Shape of `values`: (columns,).
    """

    bound: float
    values: Figures | None
    gap: float


class Programme:
    """Columns and rows are numbered in the order of their addition."""

    def __init__(self) -> None:
        self._columns: list[Figures] = []
        self._most: list[Figures] = []
        self._entries: list[tuple[Column, Column, Figures]] = []
        self._width = self._height = 0

    def columns(
        self,
        count: int,
        *,
        cost: Figures | float = 0.0,
        low: Figures | float = 0.0,
        high: Figures | float = math.inf,
        whole: bool = False,
    ) -> Column:
        """Add `count` columns, of whole numbers if `whole`; returns their numbers."""
        figures = (cost, low, high, float(whole))
        self._columns.append(np.stack([np.broadcast_to(figure, (count,)) for figure in figures], axis=1))
        self._width += count
        return np.arange(self._width - count, self._width)

    def rows(self, count: int, *, most: Figures | float = 0.0) -> Column:
        """Add `count` rows; returns their numbers."""
        self._most.append(np.broadcast_to(most, (count,)))
        self._height += count
        return np.arange(self._height - count, self._height)

    def put(self, rows: Column, columns: Column, values: Figures | float) -> None:
        """Add entries, one for each element of the three arguments."""
        self._entries.append((rows, columns, np.broadcast_to(values, rows.shape)))

    def multipliers(self) -> Figures:
        """What one more unit of each row's limit would save; shape (rows,), at least 0. Ignores `whole`."""
        if not self._width:
            return np.zeros(self._height)
        columns, most = np.concatenate(self._columns), np.concatenate(self._most)
        found = linprog(columns[:, 0], A_ub=self._matrix(), b_ub=most, bounds=columns[:, 1:3], method="highs-ipm")
        assert found.success, found.message
        multipliers: Figures = np.maximum(-found.ineqlin.marginals, 0.0)
        return multipliers

    def solve(self, *, gap: float, seconds: float) -> Solution:
        """The least cost within a relative `gap`, or what is known of it after so many seconds."""
        columns, most = np.concatenate(self._columns), np.concatenate(self._most)
        found = milp(
            columns[:, 0],
            constraints=LinearConstraint(self._matrix(), -np.inf, most),
            bounds=Bounds(columns[:, 1], columns[:, 2]),
            integrality=columns[:, 3],
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        bound = -math.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)
        if found.x is None:
            return Solution(bound, None, math.inf)
        return Solution(bound, found.x, float(found.fun) / bound - 1 if bound > 0 else math.inf)

    def _matrix(self) -> csr_matrix:
        row, column, value = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        return coo_matrix((value, (row, column)), shape=(self._height, self._width)).tocsr()
