"""Acknowledges messages of a broker that is not the state store, once the store keeps their jobs' ends on disk.

A store that is killed may come back without the last second of its writes. An end that it lost is written again if it
is known here, so that no client gets another; any other message goes back to its queue, and its job runs again. A
message that waits here does not count as prefetched: the consumer may take as many more.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from broker.valkey.claims import Verdict
from broker.valkey.endings import Ending
from broker.valkey.worker_store import WorkerStore, insist
from tasks.ticket import Ticket
from taxiway.errors import BrokerUnavailableError
from workers.celery_adapter.consumer_thread import ConsumerThread

logger = logging.getLogger(__name__)

MOST = 10_000
"""Messages that may wait here before a worker takes fewer: AMQP counts them in 16 bits."""


@dataclass(frozen=True, slots=True)
class _Message:
    """A message whose job has ended, with its copy's deadline; `settle` is told whether to acknowledge it.

    `ending` is what this worker wrote, None where that cannot be written again.
    """

    job: str
    deadline_at: float
    ending: Ending | None
    settle: Callable[[bool], None]


class Acknowledgements:
    """Messages whose jobs' ends are on their way to the store's disk.

    Any thread may `remember`; all but that and `run` is for the consumer's thread.
    """

    def __init__(self, store: WorkerStore, thread: ConsumerThread) -> None:
        self._store = store
        self._thread = thread
        self._endings: dict[str, Ending] = {}
        self._waiting: list[_Message] = []
        self._unsettled = 0
        self._changed = threading.Condition()
        self._given_up = threading.Event()

    def remember(self, ending: Ending) -> None:
        """Keep an end that was written, until its message is acknowledged."""
        self._endings[ending.job] = ending

    def after_end(self, ticket: Ticket, ack: Callable[..., Any], reject: Callable[..., Any]) -> Callable[..., None]:
        """What Celery calls instead of `ack`; `reject` puts the message back into its queue."""

        def later(*args: Any) -> None:
            grown = self._unsettled < MOST
            qos = self._thread.qos
            if grown:
                qos.increment_eventually()
            self._unsettled += 1

            def settle(over: bool) -> None:
                self._unsettled -= 1
                if grown:
                    qos.decrement_eventually()
                if over:
                    ack(*args)
                else:
                    reject(*args, True)

            self._put(_Message(ticket.job, ticket.deadline_at, self._endings.pop(ticket.job, None), settle))

        return later

    def stop(self) -> None:
        """End after what the consumer has acknowledged so far, or when the store does not answer."""
        self._thread.run()
        self._given_up.set()
        with self._changed:
            self._changed.notify()

    def run(self) -> None:
        """Serve until stopped."""
        while messages := self._take():
            try:
                over = insist(partial(self._over, messages), self._given_up, _log_unavailable)
                lost = [message for message, is_over in zip(messages, over, strict=True) if not is_over]
                written = insist(partial(self._write_again, lost), self._given_up, _log_unavailable) if lost else set()
            except BrokerUnavailableError:
                return  # the messages are delivered again
            for message, is_over in zip(messages, over, strict=True):
                if message.job in written:
                    self._put(message)
                else:
                    self._thread.call(partial(message.settle, is_over))

    def _over(self, messages: list[_Message]) -> list[bool]:
        return self._store.over([(message.job, message.deadline_at) for message in messages])

    def _write_again(self, lost: list[_Message]) -> set[str]:
        """Write the ends that are known here under new claims; the jobs that ended so."""
        endings = [message.ending for message in lost if message.ending is not None]
        _, claims = self._store.claim([(ending.job, 0.0) for ending in endings])
        ours = [
            replace(ending, token=claim.token)
            for ending, claim in zip(endings, claims, strict=True)
            if claim.verdict is Verdict.RUN
        ]
        written = {one.job for one, done in zip(ours, self._store.finish(ours), strict=True) if done}
        extra = {"written again": len(written), "to run again": len(lost) - len(written)}
        logger.warning("the store lost ends of jobs", extra=extra)
        return written

    def _put(self, message: _Message) -> None:
        with self._changed:
            self._waiting.append(message)
            self._changed.notify()

    def _take(self) -> list[_Message]:
        """All that waits, at least one message; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._given_up.is_set())
            messages, self._waiting = self._waiting, []
        return messages


def _log_unavailable(why: str) -> None:
    logger.warning("cannot acknowledge", extra={"error": why})
