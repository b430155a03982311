"""A job inside a worker: how Celery delivered it, which of its rows still wait, and how it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from celery.worker.request import Request

from tasks.catalogue import Model
from tasks.ticket import Ticket
from taxiway.errors import TaxiwayError
from taxiway.job import Result
from taxiway.wire import HEADER
from workers.pipelines import Item, Row

Traced = tuple[int, Any, float]
"""What Celery's tracer answers: whether it failed, the value as text or the exception, and the run time."""


@dataclass(slots=True, eq=False)
class Delivery:
    """One message as Celery handed it to the pool. `fields` is the request's context, which the tracer reads."""

    request: Request
    tracer: Callable[..., Traced]
    task: str
    job: str
    fields: dict[str, Any]
    accept: Callable[[int, float], None]
    succeed: Callable[[Traced], None]

    @property
    def ticket(self) -> Ticket:
        """The router's order, checked by the consumer's strategy."""
        ticket = self.fields[HEADER]
        assert isinstance(ticket, Ticket)
        return ticket

    @property
    def payload(self) -> tuple[Any, Any, dict[str, Any]]:
        """Celery's decoded body: positional arguments, keyword arguments, and what follows from the task."""
        args, kwargs, embed = self.request.message.payload
        return args, kwargs, embed or {}

    @property
    def canvas(self) -> bool:
        """Whether other tasks follow from this one: a link, an errback, a chain or a chord."""
        embed = self.payload[2]
        return any(embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord"))


@dataclass(slots=True, eq=False)
class Job:
    """A job whose rows wait, run or are answered; the device thread alone changes it.

    `started` is the store's time of the claim; `waiting` maps a size bucket to the indices of rows that no batch took.
    """

    delivery: Delivery
    ticket: Ticket
    model: Model
    variant: str
    rows: tuple[Row, ...]
    parameters: Mapping[str, Any]
    outputs: tuple[str, ...]
    single: bool
    arrived: float
    items: list[Item] = field(default_factory=list)
    waiting: dict[int, list[int]] = field(default_factory=dict)
    answers: list[Row | None] = field(default_factory=list)
    token: str = ""
    started: float = 0.0
    run_time: float = 0.0
    device_time: float = 0.0
    batch: int = 0

    @property
    def deadline(self) -> float:
        """The deadline by the store's clock, infinite where there is none."""
        return self.ticket.deadline_at or math.inf

    @property
    def done(self) -> bool:
        """Whether every row has its answer."""
        return None not in self.answers


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: with a result in plain values, or with an error.

    `generated` is the length of each answer that a model generated, in tokens.
    """

    result: Result | None = None
    error: TaxiwayError | None = None
    generated: tuple[int, ...] = ()

    def unwrap(self) -> Any:
        """The result as Celery passes it on; raises the error where that is how it ended."""
        if self.error is not None:
            raise self.error
        return msgspec.to_builtins(self.result)


@dataclass(frozen=True, slots=True)
class Ended:
    """A delivery and its outcome, with the token of the claim that it ran under ('' where it needed none)."""

    delivery: Delivery
    outcome: Outcome
    token: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A delivery of a job that has ended before: it is only acknowledged."""

    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Revoked:
    """A delivery of a job that Celery's remote control revoked."""

    delivery: Delivery


Ending = Ended | Dropped | Revoked
