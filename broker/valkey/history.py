"""The history of arrivals, read from the index of jobs and their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from broker.valkey import Call
from tasks.models.profiles import tokens_of
from taxiway.contract.job import JobState
from taxiway.contract.keys import ACCEPTED

STATES = (*JobState,)
"""The states that `Observed.outcomes` has by number."""


GROUPS = 256
"""Groups of jobs read per call."""


JOBS = 512
"""Jobs after which a call reads no further group: about 1 ms of the server's time."""


class AcceptedGroup(NamedTuple):
    """Equal jobs that were accepted together; times by the store's clock, `due` is 0 without a deadline.

    `basis` is the text in their records, empty if they were refused.
    """

    accepted: float
    due: float
    jobs: int
    model: str
    tenant: str
    basis: str


@dataclass(frozen=True, slots=True)
class Observed:
    """Groups of jobs and what became of each job.

    `looked` is the number of groups that were read, including those without a record. `outcomes` has ten bytes per job,
    in the order of the groups: the number of its state, of its class (0: none, else that of `classes` plus 1), then as
    little-endian float32 the seconds until it ended and those since it began to run, -1 if it did not. `generated`
    maps the position of a job to the mean length of its answers in tokens.
    """

    looked: int
    classes: tuple[str, ...]
    groups: tuple[AcceptedGroup, ...]
    outcomes: bytes
    generated: dict[int, int]


def observe_call(begin: float, end: float, skip: int) -> Call:
    """Reads what was accepted from `begin` until before `end`, without the first `skip` groups."""
    return Call("jobs/history", [ACCEPTED], [repr(begin), repr(end), skip, GROUPS, JOBS, *STATES])


def observe_answer(answer: Sequence[Any]) -> Observed:
    """The answer's content."""
    looked, classes, flat, outcomes, generated = answer
    groups = zip(*(flat[n::6] for n in range(6)), strict=True)
    return Observed(
        looked=looked,
        classes=tuple(name.decode() for name in classes),
        groups=tuple(
            AcceptedGroup(float(at), float(due), jobs, model.decode(), tenant.decode(), basis.decode())
            for at, due, jobs, model, tenant, basis in groups
        ),
        outcomes=outcomes,
        generated={at: _mean(bins) for at, bins in zip(generated[::2], generated[1::2], strict=True)},
    )


def _mean(bins: bytes) -> int:
    """The mean length of answers in these bins."""
    places = msgspec.json.decode(bins, type=list[int])
    return round(sum(map(tokens_of, places)) / max(len(places), 1))
