"""How much work may be bound to a queue before further requests are held: at most its horizon. Pure.

The queue of a tenant over its fair share (`Shares`) is limited to what keeps devices busy until the next release. Other
tenants then find a short queue, and their requests bypass that tenant's held jobs.
"""

from __future__ import annotations

import math

import numpy as np

from router.decide.candidates import CandidateTable, Column
from router.decide.classify import LATENCY_CRITICAL, Needs
from router.decide.cost import full_batch, limits_of, wait_of


def horizon(table: CandidateTable, needs: Needs) -> Column:
    """The most seconds of work allowed ahead of the request in each candidate's queue.

    Beyond it the request is held. Unbounded for latency-critical requests, unless their tenant is over its fair share.
    """
    if needs.brief is not None:
        return _next_batch(table, needs.brief)
    if needs.deadline is not None and needs.deadline <= LATENCY_CRITICAL:
        return np.full(len(table.candidates), math.inf)
    return table.horizon


def has_capacity(table: CandidateTable, level: int, work: np.ndarray, *, brief: float | None = None) -> bool:
    """Whether any live queue has capacity for a held request of this level.

    Args:
        table: as in `choose`.
        level: the request's priority level.
        work: as in `choose`.
        brief: as in `Needs`.
    """
    usual = _usual(table)
    limits = None if table.allowed is None else limits_of(table.allowed, usual, full_batch(table, usual) / table.limit)
    wait = wait_of(table, work[:, : level + 1].sum(axis=1), limits)
    most = table.horizon if brief is None else _next_batch(table, brief)
    return bool((table.live & (wait <= most)).any())


def _next_batch(table: CandidateTable, brief: float) -> Column:
    """Work that keeps each candidate's devices busy until the next release.

    That is `brief`, or one full batch if that takes longer.
    """
    least: Column = np.minimum(table.horizon, np.maximum(brief, full_batch(table, _usual(table))))
    return least


def _usual(table: CandidateTable) -> Needs:
    """A request of the model's expected size."""
    return Needs(deadline=None, level=0, rows=1, size=table.model.expected_size)
