"""What becomes of a message that a worker does not run: a dead letter, and an end of its job that its sender hears of.

What a router ordered is ended under a claim, as a run would be. Of any other message nobody knows whose it is: it ends
the job that it names only where no job of that id was ever accepted.
"""

from __future__ import annotations

import logging
from typing import Any

from broker.valkey.claims import Verdict
from broker.valkey.endings import REFUSED, Ending
from broker.valkey.worker_store import Store
from tasks.ticket import Ticket, TicketError
from taxiway.contract.job import failure_meta, state_of
from taxiway.contract.request import is_name
from taxiway.contract.wire import HEADER, misplaced
from taxiway.errors import BrokerUnavailableError, InvalidRequestError, TaxiwayError
from workers.celery_adapter.context import WorkerContext
from workers.celery_adapter.strategy import bury, class_of, ticket_of

logger = logging.getLogger(__name__)


def refuse(store: Store, context: WorkerContext, message: Any, reason: str) -> None:
    """Keep a message of Celery's consumer among the dead letters, and end its job with the reason."""
    bury(store, message, reason)
    try:
        _end(store, context, message, reason)
    except BrokerUnavailableError as error:  # the job ends at its deadline
        logger.error("a refused job could not be ended", extra={"error": error.message})


def _end(store: Store, context: WorkerContext, message: Any, reason: str) -> None:
    try:
        ticket = _ordered(message, context)
    except TicketError:
        job = (message.headers or {}).get("id")
        if is_name(job):
            store.finish([_ending(job, misplaced(class_of(message)), REFUSED)])
        return
    _, (claim,) = store.claim([(ticket.job, ticket.deadline_at)])
    if claim.verdict is Verdict.RUN:
        error = InvalidRequestError(f"a worker refused the message: {reason}", field="message")
        store.finish([_ending(ticket.job, error, claim.token, ticket.reply)])


def _ordered(message: Any, context: WorkerContext) -> Ticket:
    """The router's order; raises `TicketError` where there is none. Celery may have refused what had been checked."""
    checked = message.headers.get(HEADER)
    return checked if isinstance(checked, Ticket) else ticket_of(message, context)


def _ending(job: str, error: TaxiwayError, token: str, reply: str = "") -> Ending:
    return Ending(job, state_of(error), failure_meta(job, error), token, reply)
