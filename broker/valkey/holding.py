"""Holding: where jobs wait that no class can take soon, bound to nothing.

Whatever the broker, holding is in the state store, beside the jobs' records: a queue for all jobs of one tenant that
have the same candidates, ordered by deadline. `forwarding` puts jobs in and, when they are placed, takes them out.
The leader draws jobs for some seconds; what it has not placed by then goes back. So none is lost with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.valkey.lua import Call
from taxiway.contract.keys import HELD, HOLDING, LEAD, RELEASED, WORK, holding_key


@dataclass(frozen=True, slots=True)
class Line:
    """A holding queue: its name, the deadline and the level of the job that is first in it, and the number of its jobs.

    The deadline is by the store's clock, beyond 1e10 for a job that has none.
    """

    queue: str
    due: float
    level: int
    jobs: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The server's time, the holding queues, and the cells of `keys.WORK`."""

    now: float
    work: Mapping[str, float]
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A job taken out of holding to be placed; times by the store's clock, `deadline_at` 0 where there is none."""

    message: bytes
    accepted: float
    deadline_at: float
    reply: str


def survey_call() -> Call:
    """Looks at what is held."""
    return Call("routing/survey", [HOLDING, RELEASED, HELD, WORK], [holding_key("")])


def survey_answer(answer: Sequence[Any]) -> Survey:
    """What was seen."""
    cells = zip(answer[1][::2], answer[1][1::2], strict=True)
    lines = zip(answer[2::4], answer[3::4], answer[4::4], answer[5::4], strict=True)
    return Survey(
        now=float(answer[0]),
        work={cell.decode(): float(figure) for cell, figure in cells},
        lines=[Line(queue.decode(), float(due), int(level), int(jobs)) for queue, due, level, jobs in lines],
    )


def draw_call(token: str, queue: str, most: int, lease: float) -> Call:
    """Takes a queue's first jobs, for the leader; what is not placed in `lease` seconds is held again."""
    return Call("routing/draw", [LEAD, holding_key(queue), RELEASED, HELD], [token, most, lease])


def draw_answer(answer: Sequence[bytes]) -> tuple[float, list[Drawn]]:
    """The server's time, and the jobs drawn, first due first."""
    jobs = zip(answer[1::4], answer[2::4], answer[3::4], answer[4::4], strict=True)
    return float(answer[0]), [Drawn(message, float(at), float(due), reply.decode()) for message, at, due, reply in jobs]
