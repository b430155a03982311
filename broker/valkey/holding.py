"""Holding: where jobs wait that no class can start soon, bound to no class.

With either broker, holding is in the state store, beside the jobs' records: one queue, ordered by deadline, for all
jobs of a tenant that have the same candidates. `forwarding` adds jobs, and removes them when they are placed. The
leader draws jobs for a few seconds; what it has not placed by then returns, so a leader's crash loses none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.valkey.lua import Call
from taxiway.contract.keys import HELD, HOLDING, LEAD, RELEASED, WORK, holding_key


@dataclass(frozen=True, slots=True)
class HoldingQueue:
    """A holding queue: its name, the deadline and level of its first job, and its number of jobs.

    The deadline is by the store's clock; above 1e10 for a job without one.
    """

    name: str
    due: float
    level: int
    jobs: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The server's time, the cells of `keys.WORK`, and the holding queues."""

    now: float
    work: Mapping[str, float]
    queues: Sequence[HoldingQueue]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A job taken out of holding to be placed; times by the store's clock, `deadline_at` 0 if it has none."""

    message: bytes
    accepted: float
    deadline_at: float
    reply: str


def survey_call() -> Call:
    """Reads what is held."""
    return Call("routing/survey", [HOLDING, RELEASED, HELD, WORK], [holding_key("")])


def survey_answer(answer: Sequence[Any]) -> Survey:
    """The answer's content."""
    cells = zip(answer[1][::2], answer[1][1::2], strict=True)
    queues = zip(answer[2::4], answer[3::4], answer[4::4], answer[5::4], strict=True)
    return Survey(
        now=float(answer[0]),
        work={cell.decode(): float(figure) for cell, figure in cells},
        queues=[HoldingQueue(name.decode(), float(due), int(level), int(jobs)) for name, due, level, jobs in queues],
    )


def draw_call(token: str, queue: str, most: int, lease: float) -> Call:
    """Takes a queue's first jobs for the leader; what is not placed within `lease` seconds is held again."""
    return Call("routing/draw", [LEAD, holding_key(queue), RELEASED, HELD], [token, most, lease])


def draw_answer(answer: Sequence[bytes]) -> tuple[float, list[Drawn]]:
    """The server's time, and the jobs drawn, first due first."""
    jobs = zip(answer[1::4], answer[2::4], answer[3::4], answer[4::4], strict=True)
    return float(answer[0]), [Drawn(message, float(at), float(due), reply.decode()) for message, at, due, reply in jobs]
