"""The fetch thread: takes messages from a Valkey or Redis queue in bulk, no more than the next batches need.

It takes none while more has run than the finisher has written: what is held is kept, and cannot move.

What is a plain job goes to the reception at once. What Celery must see (a canvas, an eta, a message to be refused) goes
through its consumer, as a message whose acknowledgement comes back here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kombu.message import Message

from broker.valkey.class_queue import ClassQueue, Haul, Taken
from broker.valkey.worker_store import Store
from taxiway.contract.keys import LEVELS
from taxiway.contract.wire import decode_envelope
from taxiway.errors import BrokerUnavailableError, InvalidRequestError
from workers.celery_adapter.context import WorkerContext
from workers.celery_adapter.held_jobs import Ledger
from workers.celery_adapter.strategy import keep_letter
from workers.stages.admit import Reception
from workers.stages.backlog import Backlog
from workers.stages.decode import read_plain
from workers.stages.device import DeviceLoop
from workers.stages.job import Delivery

logger = logging.getLogger(__name__)

LOOK = 1.0
"""Longest wait for messages, in seconds, before the queue is looked at again: a connection may have died in silence."""

_REST = 0.0002
"""Seconds for which the device that was idle, and the finisher, have the interpreter to themselves.

What comes next here would keep them from it: an echo takes 0.1 ms less from its message to its result.
"""

_LOOKS = 4  # looks at the queue in the time that the patient work takes which waits here: its place is free by then
_PAUSE = 0.2  # seconds before another try while the broker is away


class Fetcher:
    """Keeps the device in work from the queues that Celery's consumer names. Stands for kombu's channel in messages.

    Args:
        on_hub: has a callback run on the hub's thread.
        reject: counts, by its class, a message that is none at all.
    """

    no_ack_consumers = None

    def __init__(
        self,
        queue: ClassQueue,
        context: WorkerContext,
        reception: Reception,
        loop: DeviceLoop,
        ledger: Ledger,
        store: Store,
        backlog: Backlog,
        *,
        on_hub: Callable[[Callable[[], None]], None],
        reject: Callable[[str], None],
    ) -> None:
        self._reject = reject
        self._queue = queue
        self._secret = context.settings.secret
        self._own = context.options.hardware_class
        self._reception = reception
        self._loop = loop
        self._ledger = ledger
        self._store = store
        self._backlog = backlog
        self._on_hub = on_hub
        self._consumer: Any = None
        self._followed = threading.Event()
        self._stopping = threading.Event()
        self._handed: dict[str, Message] = {}
        self._passing: set[str] = set()

    def follow(self, consumer: Any) -> None:
        """Take from the queues of this kombu consumer, from now on."""
        self._consumer = consumer
        self._followed.set()

    def leave(self) -> None:
        """Take nothing until the next consumer. What Celery still schedules is the broker's again."""
        self._followed.clear()
        waiting = [tag for tag, message in self._handed.items() if message.headers.get("eta") is not None]
        for tag in waiting:
            self._handed.pop(tag, None)
        try:
            self._queue.put_back(in_order(waiting))
        except BrokerUnavailableError:
            logger.warning("scheduled tasks wait for their visibility timeout", extra={"tasks": len(waiting)})

    def stop(self) -> None:
        """End. Any thread may call it."""
        self._stopping.set()
        self._followed.set()
        self._queue.wake()

    def run(self) -> None:
        """Fetch until stopped."""
        away = False
        while not self._stopping.is_set():
            try:
                self._fetch()
                away = False
            except BrokerUnavailableError as error:
                if not away:
                    logger.warning("cannot fetch", extra={"error": error.message})
                away = True
                self._stopping.wait(_PAUSE)

    def tags(self, held_for: float = 0.0) -> list[str]:
        """The tags of messages that Celery holds, and of those that the ledger has held for so many seconds."""
        return [*self._handed, *(delivery.tag for delivery in self._ledger.held(held_for) if delivery.tag)]

    def basic_ack(self, tag: str, multiple: bool = False) -> None:
        """Acknowledge a message that Celery has ended."""
        self._handed.pop(tag, None)
        self._queue.acknowledge([tag])

    def basic_reject(self, tag: str, requeue: bool = False) -> None:
        """Forget a message that Celery refused, or put it back."""
        self._handed.pop(tag, None)
        if requeue:
            self._queue.put_back([tag])
        else:
            self._queue.acknowledge([tag])

    def _fetch(self) -> None:
        self._followed.wait()
        queues = self._queues() if self._followed.is_set() else []
        short = self._backlog.wait_until_short(LOOK)
        room = self._loop.wait_for_room(LOOK) - len(self._passing) if short else 0
        if not queues or room <= 0:
            self._stopping.wait(0.0 if queues and not self._passing else 0.01)
            return
        levels = self._loop.levels()
        for queue in queues:
            if room > 0:
                room -= self._receive(self._queue.take(queue, room, levels))
        longest = LOOK if levels == LEVELS else self._loop.ahead / _LOOKS
        if room > 0 and (hauls := self._queue.wait(queues, longest, levels)):
            for haul in hauls:
                if self._followed.is_set() and haul.queue in self._queues():
                    self._receive(haul)
                else:
                    self._give_back(haul)
            time.sleep(_REST)

    def _queues(self) -> list[str]:
        """What Celery's consumer consumes: the worker's own class first, so that others get what room is left."""
        return sorted((queue.name for queue in self._consumer.queues), key=lambda name: (name != self._own, name))

    def _receive(self, haul: Haul) -> int:
        """Pass on what was taken; how many messages it was."""
        claimed: list[Delivery] = []
        astray: list[tuple[str, str]] = []
        for one in haul.taken:
            delivery = read_plain(one, self._secret, haul.queue)
            if delivery is None:
                self._hand_over(one, haul.queue)
            elif delivery.claim is not None:
                claimed.append(delivery)
            else:
                self._ledger.hold([delivery])
                self._reception.put(delivery)
            if one.token and (delivery is None or not delivery.claim):
                astray.append((one.job, one.token))
        self._store.release(astray)
        self._ledger.hold(claimed)
        if claimed:
            self._reception.accept(claimed, haul.now)
        return len(haul.taken)

    def _give_back(self, haul: Haul) -> None:
        """Return what was taken from a queue that the worker left meanwhile."""
        self._store.release([(one.job, one.token) for one in haul.taken if one.token])
        self._queue.put_back([one.tag for one in haul.taken])

    def _hand_over(self, taken: Taken, queue: str) -> None:
        """Give a message to Celery's consumer."""
        try:
            envelope = decode_envelope(taken.raw)
            body = envelope.payload()
        except InvalidRequestError as error:
            self._reject(queue)
            self._refuse(taken, error.message)
            return
        message = Message(
            body=body,  # type: ignore[arg-type]  # kombu's own transports give bytes
            delivery_tag=taken.tag,
            content_type=envelope.content_type,
            content_encoding=envelope.content_encoding,
            delivery_info={"exchange": queue, "routing_key": queue},
            properties=envelope.properties,
            headers=envelope.headers,
            channel=self,
        )
        self._handed[taken.tag] = message
        self._passing.add(taken.tag)
        self._on_hub(partial(self._deliver, message))

    def _deliver(self, message: Message) -> None:
        """Let Celery receive the message, on the hub's thread."""
        message.accept = self._consumer.accept
        try:
            if message.errors:  # it cannot be decompressed
                message._reraise_error(self._consumer.on_decode_error)
            else:
                self._consumer.on_message(message)
        finally:
            self._passing.discard(message.delivery_tag)

    def _refuse(self, taken: Taken, reason: str) -> None:
        """Keep what is no message at all among the dead letters."""
        keep_letter(self._store, taken.raw, reason, None)
        self._queue.acknowledge([taken.tag])


def in_order(tags: Sequence[str]) -> list[str]:
    """Tags in the order in which their messages were taken."""
    return sorted(tags, key=lambda tag: [int(part) for part in tag.split(".")[1:]])
