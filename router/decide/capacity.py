"""How much may be bound to a queue before a request is held: a horizon's worth, or less. Pure.

A tenant over its fair share (`Shares`) leaves the queue to others: only what keeps the devices busy until the next look
is bound for it, so that others find a short queue and pass what is held for it.
"""

from __future__ import annotations

import math

import numpy as np

from router.decide.candidates import CandidateTable, Column
from router.decide.classify import LATENCY_CRITICAL, Needs
from router.decide.cost import full_batch, wait_of


def horizon(table: CandidateTable, needs: Needs) -> Column:
    """The most seconds of work that may be before the request in each candidate's queue, or it is held.

    For a person who waits there is no bound, unless their tenant is over its fair share.
    """
    if needs.brief is not None:
        return _next_batch(table, needs.brief)
    if needs.deadline is not None and needs.deadline <= LATENCY_CRITICAL:
        return np.full(len(table.candidates), math.inf)
    return table.horizon


def has_room(table: CandidateTable, level: int, work: np.ndarray, *, brief: float | None = None) -> bool:
    """Whether a queue may take a request of this level, held until now.

    Args:
        table: as in `choose`.
        level: the request's.
        work: as in `choose`.
        brief: as in `Needs`.
    """
    wait = wait_of(table, work[:, : level + 1].sum(axis=1))
    most = table.horizon if brief is None else _next_batch(table, brief)
    return bool((table.live & (wait <= most)).any())


def _next_batch(table: CandidateTable, brief: float) -> Column:
    """What keeps each candidate's devices busy until more is bound: a batch, where that takes longer than `brief`."""
    least: Column = np.minimum(table.horizon, np.maximum(brief, full_batch(table, table.model.expected_size)))
    return least
