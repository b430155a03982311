"""Celery's pool over one device, and the threads beside Celery's own that serve it.

`fetch` takes messages from Valkey and reads them, `intake` claims what Celery's consumer hands over, `device` forms
batches and runs them, `finisher` writes results and acknowledges, `streams` tells answers as they come, and `pulse`
keeps what is held. What touches the connection of Celery's consumer is done on the thread that owns it, the hub's.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from celery.concurrency.base import BasePool
from celery.worker import state

from tasks.artefacts import ArtefactStore
from tasks.local.machine import packages
from tasks.profiles import ProfileBook, load_book
from tasks.settings import STATES
from taxiway.blobs import Reference
from taxiway.errors import BrokerUnavailableError
from taxiway.keys import INFER
from workers.context import WorkerContext, context_of
from workers.device import DeviceMissingError, find_device
from workers.events import TaskEvents
from workers.executor import Executor
from workers.fetcher import Fetcher, in_order
from workers.finisher import Finisher
from workers.intake import Intake
from workers.ledger import Ledger
from workers.loop import DeviceLoop
from workers.pulse import Pulse
from workers.reception import Reception
from workers.store import Store, insist
from workers.strategy import bury, bytes_of, keep_letter
from workers.streams import Streams
from workers.transport import ClassQueue
from workers.work import Delivery, Handed

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
        self._callbacks: deque[Callable[[], None]] = deque()
        self._hub: Any = None
        self._stopping = threading.Event()
        executor = _executor(context)
        worker, limits = self.options["initargs"][1], context.topology.limits
        self._store = Store(context.settings.state, worker, limits, executor.device.label)
        self._queue = _class_queue(context, worker)
        self.ledger = self._make_ledger(context, worker)
        self._finisher = Finisher(
            self.app,
            self._store,
            self.ledger,
            self._queue,
            hardware_class=context.options.hardware_class,
            device=executor.device,
            on_hub=self._on_hub,
            again=lambda delivery: self._reception.put(delivery),
        )
        self._streams = Streams(self._store)
        self._loop = DeviceLoop(
            executor,
            self._store,
            end=self._finisher.put,
            accepted=self._accept,
            revoked=state.revoked.__contains__,
            again=lambda delivery: self._reception.put(delivery),
            tell=self._streams.put,
        )
        intake = Intake(context.catalogue, context.options.hardware_class, self._blobs)
        self._reception = Reception(intake, self._loop, self._store, end=self._finisher.put, bury=self._bury)
        self.pulse = Pulse(self._loop, context.options.hardware_class, held=lambda: len(self.ledger), keep=self._keep)
        self._start_threads(context)

    def on_apply(self, target: Any, args: Any, kwargs: Any = None, **options: Any) -> None:
        """Take a request over from the consumer. Returns at once."""
        task, job, fields = args[:3]
        accept: Callable[[int, float], None] = options["accept_callback"]
        request = accept.__self__  # type: ignore[attr-defined]  # a bound method of the request, in every Celery
        handed = Handed(request, target, task, fields, accept, options["callback"])
        message = request.message
        body, now = bytes_of(message.body), time.time()
        delivery = Delivery(job, handed.ticket, body, message.content_type, now, handed=handed)
        self.ledger.hold([delivery])
        self._reception.put(delivery)

    def register_with_event_loop(self, loop: Any) -> None:
        """Learn the hub, anew after each connection."""
        self._hub = loop
        loop.call_soon(self._run_callbacks)

    def show(self) -> None:
        """Let Celery's tools see what is here, and the store what runs; on the hub's thread."""
        began = self.ledger.show()
        if began or self.ledger.events.waiting:
            self._finisher.tell(began)

    def on_close(self) -> None:
        """Say that the worker takes no more."""
        self.pulse.retire()

    def on_stop(self) -> None:
        """Finish the batch that runs, write what is done, and leave the rest for its queue."""
        self._stopping.set()
        for name, stop in self._stops.items():
            stop()
            self._threads[name].join()
        self._run_callbacks()
        self._give_back()

    def on_terminate(self) -> None:
        """Leave everything for its queue at once, also what runs."""
        self._stopping.set()
        if self.fetcher is not None:
            self.fetcher.stop()
        self._give_back()

    def terminate_job(self, pid: Any, signal: Any = None) -> None:
        """Nothing: a device cannot drop one row of a batch. Celery has marked the job, so its answer is not written."""

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
            context.options.hardware_class,
            TaskEvents(worker, self.app.clock, publish),
            revoke=lambda revoked: self._finisher.put([revoked]),
            on_hub=self._on_hub,
        )

    def _start_threads(self, context: WorkerContext) -> None:
        loaded = threading.Event()

        def serve_device() -> None:
            for name in context.hardware.warm:
                self._loop.executor.warm_up(context.catalogue.resolve(name))
            loaded.set()
            self._loop.run()

        roles: dict[str, _Role] = {
            "intake": (self._reception.run, self._reception.stop),
            "device": (serve_device, self._loop.stop),
            "finisher": (self._finisher.run, self._finisher.stop),
            "streams": (self._streams.run, self._streams.stop),
            "pulse": (self.pulse.run, self.pulse.stop),
        }
        if self._queue is not None:
            self.fetcher = Fetcher(
                self._queue, context, self._reception, self._loop, self.ledger, self._store, on_hub=self._on_hub
            )
            roles = {"fetch": (self.fetcher.run, self.fetcher.stop), **roles}
        self._stops = {name: stop for name, (_, stop) in roles.items()}
        self._threads = {name: _thread(name, run) for name, (run, _) in roles.items() if name != "pulse"}
        loaded.wait()
        _spare_collections()
        self.pulse.beat()
        self._threads["pulse"] = _thread("pulse", self.pulse.run)

    def _keep(self) -> None:
        """Renew the claims and the messages that are held, and learn which claims are not any more."""
        claimed = [(delivery, delivery.token) for delivery in self.ledger.held() if delivery.token]
        ours = self._store.renew([(delivery.job, token) for delivery, token in claimed])
        for (delivery, token), held in zip(claimed, ours, strict=True):
            if not held and delivery.token == token:  # not claimed anew since
                delivery.lost = True
        if self._queue is not None and self.fetcher is not None:
            self._queue.keep(self.fetcher.tags())

    def _give_back(self) -> None:
        """Release the claims of jobs that are not finished, and return their messages to the queue."""
        held = [(delivery.job, delivery.token) for delivery in self.ledger.held() if delivery.token]
        with contextlib.suppress(BrokerUnavailableError):  # then the leases end by themselves
            self._store.release(held)
            if self._queue is not None and self.fetcher is not None:
                self._queue.put_back(in_order(self.fetcher.tags()))

    def _bury(self, delivery: Delivery, reason: str) -> None:
        """Keep a job's message among the dead letters."""
        if delivery.handed is not None:
            bury(self._store, delivery.handed.request.message, reason)
        elif self._queue is not None:
            keep_letter(self._store, self._queue.message(delivery.tag), reason, delivery.job)

    def _blobs(self, found: Sequence[Reference]) -> dict[str, bytes | None]:
        """What a request refers to, once the store answers."""

        def say_away(why: str) -> None:
            logger.warning("cannot fetch inputs", extra={"error": why})

        return insist(lambda: self._store.blobs(found), self._stopping, say_away)

    def _accept(self, deliveries: Sequence[Delivery]) -> None:
        """Let Celery say that its tasks have started."""
        now, pid = time.monotonic(), os.getpid()
        for delivery in deliveries:
            if delivery.handed is not None:
                self._on_hub(partial(delivery.handed.accept, pid, now))

    def _on_hub(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if len(self._callbacks) == 1 and self._hub is not None:  # else it is awake, and runs this one too
            self._hub.call_soon(self._run_callbacks)

    def _run_callbacks(self) -> None:
        while self._callbacks:
            try:
                self._callbacks[0]()
            except Exception:  # one task's acknowledgement must not end the consumer's loop
                logger.exception("Celery could not end a task")
            finally:
                self._callbacks.popleft()


def _class_queue(context: WorkerContext, worker: str) -> ClassQueue | None:
    """The hold on the class's queue; None where Celery's consumer takes from another kind of broker."""
    settings = context.settings
    if settings.broker.partition("://")[0] not in STATES:
        return None
    return ClassQueue(settings.broker, worker, context.topology.limits, claiming=settings.broker_is_state)


def _executor(context: WorkerContext) -> Executor:
    try:
        device = find_device(context.hardware, context.options.device, emulate=context.options.emulate)
    except DeviceMissingError as error:
        logger.critical("no device", extra={"class": context.options.hardware_class, "reason": str(error)})
        sys.stderr.write(f"{error}\nhint: start this class with --emulate to serve it on the CPU, marked as emulated\n")
        raise SystemExit(NO_DEVICE) from error
    artefacts = ArtefactStore(context.settings.cache)
    return Executor(context.hardware, device, artefacts, threads=context.options.threads, book=_book(context))


def _book(context: WorkerContext) -> ProfileBook:
    """The profiles as of today. A file that cannot be read costs its device the warning, not the worker its start."""
    today = datetime.datetime.now(datetime.UTC).date()
    book, broken = load_book(context.settings.models, today, packages())
    for error in broken:
        logger.warning("a profile cannot be read", extra={"error": str(error)})
    return book


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
