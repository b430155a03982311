"""Celery's pool over one device: takes what the consumer hands over, and gives outcomes back to it.

Three threads beside Celery's own: `intake` reads requests and prepares rows, `device` forms batches and runs them,
`finisher` writes results. What touches the broker's connection is done on the thread that owns it, the hub's.
"""

from __future__ import annotations

import datetime
import logging
import os
import queue
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
from taxiway.errors import ExecutionError, TaxiwayError
from workers.context import WorkerContext, context_of
from workers.device import DeviceMissingError, find_device
from workers.executor import Executor
from workers.finisher import Finisher
from workers.intake import Intake, prepare
from workers.loop import DeviceLoop
from workers.pulse import Pulse
from workers.store import Store
from workers.work import Delivery, Ended, Outcome

logger = logging.getLogger(__name__)

NO_DEVICE = 3
"""Exit status of a worker whose device is not there."""

BROKEN = 70
"""Exit status of a worker that lost one of its threads (EX_SOFTWARE of sysexits.h): its supervisor starts another."""


class DevicePool(BasePool):
    """One device, on threads of this process. Concurrency is always 1: batches are the parallelism."""

    task_join_will_block = False

    def on_start(self) -> None:
        """Find the device, load what the class keeps warm, and say that the worker is there.

        Raises:
            SystemExit: the device is missing.
        """
        self.limit = 1
        context = context_of(self.app)
        self._callbacks: deque[Callable[[], None]] = deque()
        self._hub: Any = None
        self._intake = Intake(context.catalogue, context.options.hardware_class)
        self._arrivals: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        executor = _executor(context)
        worker, limits = self.options["initargs"][1], context.topology.limits
        store = Store(context.settings.state, worker, limits, executor.device.label)
        self._finisher = Finisher(self.app, store, on_hub=self._on_hub, again=self._arrivals.put)
        self._loop = DeviceLoop(
            executor,
            store,
            context.options.hardware_class,
            end=self._finisher.put,
            accepted=self._accept,
            revoked=state.revoked.__contains__,
        )
        self.pulse = Pulse(self._loop, context.options.hardware_class, held=lambda: len(state.reserved_requests))
        self._start_threads(context)

    def on_apply(self, target: Any, args: Any, kwargs: Any = None, **options: Any) -> None:
        """Take a request over from the consumer. Returns at once."""
        task, job, fields = args[:3]
        accept: Callable[[int, float], None] = options["accept_callback"]
        delivery = Delivery(
            request=accept.__self__,  # type: ignore[attr-defined]  # a bound method of the request, in every Celery
            tracer=target,
            task=task,
            job=job,
            fields=fields,
            accept=accept,
            succeed=options["callback"],
        )
        self._arrivals.put(delivery)

    def register_with_event_loop(self, loop: Any) -> None:
        """Learn the hub, anew after each connection."""
        self._hub = loop
        self._on_hub(lambda: None)

    def on_close(self) -> None:
        """Say that the worker takes no more."""
        self.pulse.retire()

    def on_stop(self) -> None:
        """Finish the batch that runs, write what is done, and leave the rest for its queue."""
        stops: list[Callable[[], None]] = [
            partial(self._arrivals.put, None),
            self._loop.stop,
            self._finisher.stop,
            self.pulse.stop,
        ]
        for stop, thread in zip(stops, self._threads, strict=True):
            stop()
            thread.join()
        self._run_callbacks()

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

    def _start_threads(self, context: WorkerContext) -> None:
        loaded = threading.Event()

        def serve_device() -> None:
            for name in context.hardware.warm:
                self._loop.executor.warm_up(context.catalogue.resolve(name))
            loaded.set()
            self._loop.run()

        bodies = {"intake": self._take_in, "device": serve_device, "finisher": self._finisher.run}
        self._threads = [_thread(name, body) for name, body in bodies.items()]
        loaded.wait()
        self.pulse.beat()
        self._threads.append(_thread("pulse", self.pulse.run))

    def _take_in(self) -> None:
        """The intake thread: deliveries become jobs, prepared where their variant is loaded already."""
        executor = self._loop.executor
        while (delivery := self._arrivals.get()) is not None:
            try:
                job = self._intake.admit(delivery, time.monotonic())
                loaded = executor.ready(job.model, job.variant)
                if loaded is not None:
                    prepare(job, loaded)
            except TaxiwayError as error:
                self._finisher.put([Ended(delivery, Outcome(error=error))])
            except Exception as error:  # a pipeline's own code may raise anything, for this one request
                logger.exception("a request could not be read", extra={"job": delivery.job})
                failed = ExecutionError(f"the request could not be read: {type(error).__name__}: {error}")
                self._finisher.put([Ended(delivery, Outcome(error=failed))])
            else:
                self._loop.put(job)

    def _accept(self, deliveries: Sequence[Delivery]) -> None:
        """Let Celery say that the tasks have started."""
        now, pid = time.monotonic(), os.getpid()
        for delivery in deliveries:
            self._callbacks.append(partial(delivery.accept, pid, now))
        self._wake()

    def _on_hub(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        self._wake()

    def _wake(self) -> None:
        if self._hub is not None:
            self._hub.call_soon(self._run_callbacks)

    def _run_callbacks(self) -> None:
        while self._callbacks:
            callback = self._callbacks.popleft()
            try:
                callback()
            except Exception:  # one task's acknowledgement must not end the consumer's loop
                logger.exception("Celery could not end a task")


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
