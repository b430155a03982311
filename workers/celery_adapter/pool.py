"""Celery's pool over one device, and the threads beside Celery's own that serve it.

`fetch` takes messages from Valkey and reads them, `intake` claims what Celery's consumer hands over, `device` forms
batches and runs them, `finisher` writes results and acknowledges, `acknowledgements` has what came from RabbitMQ
acknowledged once results are kept, `streams` tells answers as they come, `withdrawals` hears of jobs that were ended
for it, `folder` follows the models folder, `notice` hears that the machine is to be reclaimed, and `pulse` keeps what
is held. What touches the connection of Celery's consumer is done on the thread that owns it, the hub's.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from celery import signals
from celery.concurrency.base import BasePool
from celery.worker import state

from broker.valkey.class_queue import ClassQueue
from broker.valkey.worker_store import Store, insist
from tasks.models.artefacts import ArtefactStore
from tasks.retarget import unfit_for
from tasks.settings import STATES
from tasks.ticket import Ticket
from tasks.tracing import trail_of
from taxiway.contract.blobs import Buffer, Reference
from taxiway.contract.keys import INFER
from taxiway.errors import BrokerUnavailableError
from workers.celery_adapter.acknowledgements import Acknowledgements
from workers.celery_adapter.consumer_thread import Hub
from workers.celery_adapter.context import WorkerContext, context_of
from workers.celery_adapter.events import TaskEvents
from workers.celery_adapter.held_jobs import Ledger
from workers.celery_adapter.out_of_memory import Exhaustion
from workers.celery_adapter.refusal import refuse
from workers.celery_adapter.strategy import bury, bytes_of, class_of, keep_letter
from workers.device import DeviceMissingError, find_device
from workers.drain import Departure
from workers.executor import Executor
from workers.heartbeat import Pulse
from workers.reclaim_notice import SIGNAL as NOTICE
from workers.reclaim_notice import NoticeWatch
from workers.reload import FolderWatch
from workers.stages.admit import Reception
from workers.stages.cancellation import Withdrawals
from workers.stages.decode import Intake
from workers.stages.device import DeviceLoop
from workers.stages.fetch import Fetcher, in_order
from workers.stages.finish import Finisher
from workers.stages.job import Delivery, Handed
from workers.stages.outcomes import Account
from workers.stages.prefetch import ahead_of
from workers.stages.requeue import Returns
from workers.stages.retry import Retries
from workers.stages.stream import Streams

logger = logging.getLogger(__name__)

NO_DEVICE = 3
"""Exit status of a worker whose device is not there."""

BROKEN = 70
"""Exit status of a worker that lost one of its threads (EX_SOFTWARE of sysexits.h): its supervisor starts another."""

_YOUNG = 10_000
"""New objects after which the garbage collector looks at them: a look takes half a millisecond."""

_Role = tuple[Callable[[], None], Callable[[], None]]
"""What a thread runs, and how it is told to end."""


class DevicePool(BasePool):
    """One device, on threads of this process. Concurrency is always 1: batches are the parallelism."""

    task_join_will_block = False

    fetcher: Fetcher | None = None

    def on_start(self) -> None:
        """Find the device, load what the class keeps warm, and say that the worker is there.

        Raises:
            SystemExit: the device is missing.
        """
        self.limit = 1
        context = context_of(self.app)
        self.hub = Hub()
        self._stopping = threading.Event()
        executor = _executor(context)
        worker, limits = self.options["initargs"][1], context.topology.limits
        self._store = Store(context.settings.state, worker, limits, executor.device.label)
        self._queue = _class_queue(context, worker)
        self.ledger = self._make_ledger(context, worker)
        self.departure = Departure()
        self._acknowledgements = None if self._queue is not None else Acknowledgements(self._store, self.hub)
        self._returns = Returns(self._store, self.ledger, self._queue, self.hub.call)
        self._account = Account(executor.device.label)
        self._finisher = self._make_finisher(executor)
        self._streams = Streams(self._store)
        self._withdrawals = Withdrawals(self._store, self.ledger.held, self._say_occupied)
        self._loop = self._make_loop(executor)
        self._reception = self._make_reception(context)
        self._folder = FolderWatch(context, self._loop, self._store)
        self._notice = NoticeWatch(context.hardware.notice, self._reclaimed)
        self.pulse = self._make_pulse(context)
        signal.signal(NOTICE, lambda *_: self._notice.signal())
        signals.worker_shutting_down.connect(self._told_to_stop, weak=False)
        self._start_threads(context)

    def on_apply(self, target: Any, args: Any, kwargs: Any = None, **options: Any) -> None:
        """Take a request over from the consumer. Returns at once."""
        task, job, fields = args[:3]
        accept: Callable[[int, float], None] = options["accept_callback"]
        request = accept.__self__  # type: ignore[attr-defined]  # a bound method of the request, in every Celery
        handed = Handed(request, target, task, fields, accept, options["callback"])
        message = request.message
        body, now = bytes_of(message.body), time.time()
        delivery = Delivery(
            job,
            handed.ticket,
            body,
            message.content_type,
            now,
            hardware_class=class_of(message),
            trail=trail_of(fields),
            handed=handed,
        )
        self.ledger.hold([delivery])
        self._reception.put(delivery)

    def acknowledging(self, ticket: Ticket, ack: Callable[..., Any], reject: Callable[..., Any]) -> Callable[..., Any]:
        """How Celery acknowledges a message: on another kind of broker not before the store keeps the job's end."""
        return ack if self._acknowledgements is None else self._acknowledgements.after_end(ticket, ack, reject)

    def unfit_for(self, hardware_class: str) -> str | None:
        """Why the device may not serve a class; None where it may."""
        return unfit_for(hardware_class, self.pulse.facts, context_of(self.app).topology)

    def register_with_event_loop(self, loop: Any) -> None:
        """Learn the hub, anew after each connection."""
        self.hub.follow(loop)

    def show(self) -> None:
        """Let Celery's tools see what is here, and the store what runs; on the hub's thread."""
        began = self.ledger.show()
        if began or self.ledger.events.waiting:
            self._finisher.tell(began)

    def on_close(self) -> None:
        """Say that the worker takes no more."""
        self.departure.within(self._store.limits.grace)
        self.pulse.beat()

    def on_stop(self) -> None:
        """Finish what ends within the grace, write what is done, and leave the rest for its queue."""
        cold: Any = state.should_terminate
        if cold:
            self.departure.within(0.0)
        self._stopping.set()
        for name, stop in self._stops.items():
            stop()
            self.departure.wait_for(self._threads[name], self.hub.stand_in)
        self._give_back()
        if self._threads["device"].is_alive():
            logger.warning("a batch did not end within the grace: its jobs are back in their queue")
            atexit.register(os._exit, 0)  # native code that runs would not survive the interpreter's end

    def on_terminate(self) -> None:
        """Leave everything for its queue at once, also what runs."""
        self._stopping.set()
        if self.fetcher is not None:
            self.fetcher.stop()
        self._give_back()

    def terminate_job(self, pid: Any, signal: Any = None) -> None:
        """Nothing: Celery has marked the job, so a callable that runs for it is ended, and no answer is written."""

    def _get_info(self) -> dict[str, Any]:
        """What `celery inspect stats` and Flower show of the pool."""
        return {
            "implementation": f"{__name__}:{type(self).__name__}",
            "max-concurrency": self.limit,
            "processes": [os.getpid()],
            **self.pulse.shown(),
        }

    def _make_ledger(self, context: WorkerContext, worker: str) -> Ledger:
        publish = self._queue.publish if self._queue is not None else lambda topic, message: None
        return Ledger(
            self.app.tasks[INFER],
            worker,
            TaskEvents(worker, self.app.clock, publish),
            revoke=lambda revoked: self._finisher.put([revoked]),
            on_hub=self.hub.call,
        )

    def _make_finisher(self, executor: Executor) -> Finisher:
        return Finisher(
            self.app,
            self._store,
            self.ledger,
            self._account,
            self._queue,
            device=executor.device,
            on_hub=self.hub.call,
            again=lambda delivery: self._reception.put(delivery),
            wrote=self._acknowledgements.remember if self._acknowledgements is not None else lambda ending: None,
        )

    def _make_loop(self, executor: Executor) -> DeviceLoop:
        exhaustion = Exhaustion(self._store.limits.memory_faults, executor.runs_example, self.departure)
        return DeviceLoop(
            executor,
            self._store,
            end=Retries(self._finisher.put, self._later, self._store.limits.attempts, exhaustion).put,
            accepted=self._accept,
            revoked=state.revoked.__contains__,
            again=lambda delivery: self._reception.put(delivery),
            give_back=self._returns.give_back,
            departure=self.departure,
            tell=self._streams.put,
        )

    def _make_reception(self, context: WorkerContext) -> Reception:
        return Reception(
            Intake(context.folder, context.topology.hardware, self._blobs),
            self._loop,
            self._store,
            end=self._finisher.put,
            bury=self._bury,
            give_back=self._returns.give_back,
        )

    def _make_pulse(self, context: WorkerContext) -> Pulse:
        return Pulse(
            self._loop,
            self.departure,
            context.options.hardware_class,
            serves=lambda: list(self.app.amqp.queues.consume_from),
            held=lambda: len(self.ledger),
            keep=self._keep,
            done=self._account.told,
            alive=context.options.alive,
        )

    def _start_threads(self, context: WorkerContext) -> None:
        loaded = threading.Event()

        def serve_device() -> None:
            for model in context.warm():
                self._loop.executor.warm_up(model)
            loaded.set()
            self._loop.run()

        roles: dict[str, _Role] = {
            "intake": (self._reception.run, self._reception.stop),
            "device": (serve_device, self._loop.stop),
            "finisher": (self._finisher.run, self._finisher.stop),
            **self._acknowledging_role(),
            "streams": (self._streams.run, self._streams.stop),
            "withdrawals": (self._withdrawals.run, self._withdrawals.stop),
            "folder": (self._folder.run, self._folder.stop),
            "notice": (self._notice.run, self._notice.stop),
            "pulse": (self.pulse.run, self.pulse.stop),
        }
        if self._queue is not None:
            self.fetcher = Fetcher(
                self._queue,
                context,
                self._reception,
                self._loop,
                self.ledger,
                self._store,
                self._finisher.backlog,
                on_hub=self.hub.call,
                reject=self._account.reject,
            )
            roles = {"fetch": (self.fetcher.run, self.fetcher.stop), **roles}
        self._stops = {name: stop for name, (_, stop) in roles.items()}
        self._threads = {name: _thread(name, run) for name, (run, _) in roles.items() if name != "pulse"}
        loaded.wait()
        _spare_collections()
        self.pulse.beat()
        self._threads["pulse"] = _thread("pulse", self.pulse.run)

    def _acknowledging_role(self) -> dict[str, _Role]:
        """The thread that has messages acknowledged, where there is one: the hub brings the last."""
        acknowledgements = self._acknowledgements
        if acknowledgements is None:
            return {}

        def stop() -> None:
            self.hub.run()
            acknowledgements.stop()

        return {"acknowledgements": (acknowledgements.run, stop)}

    def _keep(self, held_for: float) -> None:
        """Renew the claims and the messages held for so many seconds, and learn which claims are not any more."""
        claimed = [(delivery, delivery.token) for delivery in self.ledger.held(held_for) if delivery.token]
        ours = self._store.renew([(delivery.job, token) for delivery, token in claimed])
        for (delivery, token), held in zip(claimed, ours, strict=True):
            if not held and delivery.token == token:  # not claimed anew since
                delivery.lost = True
        if self._queue is not None and self.fetcher is not None:
            self._queue.keep(self.fetcher.tags(held_for))
            self._queue.recover()

    def _give_back(self) -> None:
        """Release the claims of jobs that are not finished, return their messages, and say that the worker is gone."""
        self._returns.give_back(self.ledger.held())
        self.hub.run()
        if self._queue is not None and self.fetcher is not None:
            with contextlib.suppress(BrokerUnavailableError):  # then they return when the lease ends
                self._queue.put_back(in_order(self.fetcher.tags()))
        self.pulse.retire()

    def _told_to_stop(self, how: str, **_: Any) -> None:
        """Begin the grace; asked once more, end it. In a signal's handler."""
        if how == "Warm":
            self.departure.stop(self._store.limits.grace)

    def _reclaimed(self, grace: float) -> None:
        """Leave, for the machine goes in so many seconds."""
        begins = not self.departure.told
        self.departure.within(grace)
        if begins:
            extra = {"grace": grace, "held": len(self.ledger)}
            logger.warning("the machine is to be reclaimed: the worker drains and leaves", extra=extra)
            self.pulse.beat()
            state.should_stop = os.EX_OK  # type: ignore[assignment]  # None in Celery's module, until somebody says so

    def reject(self, message: Any, reason: str) -> None:
        """Count a message of Celery's consumer that is not run, keep it as a dead letter, and end its job."""
        self._account.reject(class_of(message))
        refuse(self._store, context_of(self.app), message, reason)

    def _bury(self, delivery: Delivery, reason: str) -> None:
        """Keep a job's message among the dead letters."""
        if delivery.handed is not None:
            bury(self._store, delivery.handed.request.message, reason)
        elif self._queue is not None:
            keep_letter(self._store, self._queue.message(delivery.tag), reason, delivery.job)

    def _blobs(self, found: Sequence[Reference]) -> dict[str, Buffer | None]:
        """What a request refers to, once the store answers."""

        def say_away(why: str) -> None:
            logger.warning("cannot fetch inputs", extra={"error": why})

        return insist(lambda: self._store.blobs(found), self._stopping, say_away)

    def _later(self, delivery: Delivery, *, pause: float) -> None:
        """Let a delivery run again after some seconds."""
        self._reception.put(delivery, pause=pause)

    def _say_occupied(self) -> None:
        """Tell routers at once of a batch that goes on though its jobs were ended: their work no longer counts."""
        if self._loop.occupied(time.monotonic()):
            self.pulse.beat()

    def _accept(self, deliveries: Sequence[Delivery]) -> None:
        """Let Celery say that its tasks have started."""
        now, pid = time.monotonic(), os.getpid()
        for delivery in deliveries:
            if delivery.handed is not None and not delivery.retries:
                self.hub.call(partial(delivery.handed.accept, pid, now))


def _class_queue(context: WorkerContext, worker: str) -> ClassQueue | None:
    """The hold on the class's queue; None where Celery's consumer takes from another kind of broker."""
    settings = context.settings
    if settings.broker.partition("://")[0] not in STATES:
        return None
    return ClassQueue(
        settings.broker,
        worker,
        context.topology.limits,
        claiming=settings.broker_is_state,
        ahead=ahead_of(context.hardware),
    )


def _executor(context: WorkerContext) -> Executor:
    try:
        device = find_device(context.hardware, context.options.device, emulate=context.options.emulate)
    except DeviceMissingError as error:
        logger.critical("no device", extra={"class": context.options.hardware_class, "reason": str(error)})
        sys.stderr.write(f"{error}\nhint: start this class with --emulate to serve it on the CPU, marked as emulated\n")
        raise SystemExit(NO_DEVICE) from error
    artefacts = ArtefactStore(context.settings.cache)
    return Executor(context.hardware, device, artefacts, threads=context.options.threads, book=context.folder.book)


def _spare_collections() -> None:
    """Let the garbage collector pass over what stays: it took 30 of 100 µs of a worker's time an echo."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 10, 10)


def _thread(name: str, body: Callable[[], None]) -> threading.Thread:
    """A started thread; when its body fails the process ends, so that its supervisor starts another."""

    def guarded() -> None:
        try:
            body()
        except BaseException:
            try:
                logger.critical("a thread of the worker failed", extra={"loop": name}, exc_info=True)
            finally:
                os._exit(BROKEN)

    thread = threading.Thread(target=guarded, name=f"taxiway-{name}", daemon=True)
    thread.start()
    return thread
