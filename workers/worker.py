"""One device's worker: its stages, the queues between them, and their threads.

class queue ─► fetch ─────────► admit ─► DeviceQueue ─► device ─► EndingQueue ─► finish ─► state store
                     └► AdmitQueue ─┘ ▲                       │
    Celery's consumer ──────┘ ▲       │                       └────► PieceQueue ──► stream ─► state store
                              └── a retry, or a lost claim: from device and finish

`HeldJobs` has every delivery from the class queue to its end. Further threads: `heartbeat` renews claims and publishes
the device's facts, `cancellations` marks held jobs that were cancelled or expired, `reload` follows the models folder,
and `notice` watches for a reclaim notice. The worker of an endpoint has the same stages but for another device stage
(`endpoints.stage`). Nothing here or in `stages/` imports Celery: they use the interface `stages.job.CeleryWorker`, and
`celery_adapter.pool` starts the worker.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from broker.valkey.class_queue import ClassQueue
from broker.valkey.worker_store import WorkerStore
from tasks.heartbeat import HEARTBEAT
from tasks.models.artefacts import ArtefactStore
from tasks.topology import Topology
from workers.device import Device, DeviceMissingError, WorkerContext, find_device
from workers.drain import Drain, NoticeWatch
from workers.endpoints.protocol import open_protocol
from workers.endpoints.variants import EndpointVariants
from workers.executor import Executor
from workers.heartbeat import Heartbeat, ModelsWatch
from workers.stages.admit import AdmitStage
from workers.stages.device import DeviceStage, Retries
from workers.stages.fetch import FetchStage
from workers.stages.finish import FinishStage, StreamStage
from workers.stages.held import Cancellations, HeldJobs
from workers.stages.job import CeleryWorker, Delivery
from workers.stages.outcomes import WorkerOutcomes
from workers.stages.queues import AdmitQueue, DeviceDriver, DeviceQueue, EndingQueue, PieceQueue, Shared, ahead_of

logger = logging.getLogger(__name__)

NO_DEVICE = 3
"""Exit status of a worker whose device is missing."""

BROKEN = 70
"""Exit status of a worker that lost one of its threads (EX_SOFTWARE of sysexits.h): its supervisor starts another."""

_YOUNG = 10_000
"""New objects per garbage collection, which takes half a millisecond."""


class ThreadService(Protocol):
    """A service with its own thread."""

    def run(self) -> None:
        """Run until stopped."""

    def stop(self) -> None:
        """End `run`. Any thread may call it."""


class Worker:
    """Composes the stages of one worker process.

    Raises:
        SystemExit: the device is missing.
    """

    def __init__(self, context: WorkerContext, name: str, celery: CeleryWorker, class_queue: ClassQueue) -> None:
        limits, found = context.topology.limits, _device(context)
        store = WorkerStore(context.settings.broker, name, limits, found.label)
        held = HeldJobs(store, class_queue, celery)
        drain, counters = Drain(), WorkerOutcomes(found.label, context.topology.tenants)
        self.context, self.store, self.held, self.drain, self.counters = context, store, held, drain, counters
        self._celery, self._shutdown = celery, threading.Event()

        admissions, endings, pieces = AdmitQueue(), EndingQueue(), PieceQueue()
        self.admissions, self.endings = admissions, endings

        shared = Shared(admissions, endings, pieces, store, held, celery, drain, context.seal_keys)
        drive = _drive_device if context.hardware.endpoint is None else _drive_endpoint
        device, jobs = drive(context, found, shared)
        admit = AdmitStage(jobs, device.variants, shared, context, self._shutdown, counters)
        self.finish = FinishStage(shared, counters, class_queue, device.variants)
        self.fetch = FetchStage(class_queue, admit, device, self.finish, counters, shared, context)
        self.heartbeat = Heartbeat(device, shared, counters, context.options)
        self.notice = NoticeWatch(
            context.hardware.notice, self._reclaimed, closes=lambda: context.closes(time.time()), grace=limits.grace
        )
        self._device, self._jobs = device, jobs
        self._reload = ModelsWatch(context, device, store)
        self._services: dict[str, ThreadService] = {
            "fetch": self.fetch,
            "admit": admit,
            "device": device,
            "finish": self.finish,
            "stream": StreamStage(pieces, store),
            "cancellations": Cancellations(store, held, self._marked),
            "reload": self._reload,
            "notice": self.notice,
            "heartbeat": self.heartbeat,
        }

    def start(self) -> None:
        """Take the name, load the class's warm models, start all services, and publish the first heartbeat.

        Raises:
            SystemExit: another live process has the worker's name.
        """
        self.heartbeat.name.take()
        self._threads: dict[str, threading.Thread] = {}
        loaded = threading.Event()

        def serve_device() -> None:
            self._device.warm_up(self.context.warm())
            loaded.set()
            self._device.run()

        for name, service in self._services.items():
            if name != "heartbeat":
                self._threads[name] = start_thread(name, serve_device if service is self._device else service.run)
        while not loaded.wait(HEARTBEAT):
            self.heartbeat.name.keep()
        _tune_collector()
        self.heartbeat.beat()
        self._threads["heartbeat"] = start_thread("heartbeat", self.heartbeat.run)

    def receive(self, delivery: Delivery) -> None:
        """Accept a delivery that Celery's consumer received. Returns immediately."""
        self.held.hold([delivery])
        self.admissions.put(delivery)

    def close(self) -> None:
        """Start to drain, within the grace of queues.yaml, and publish it."""
        self.drain.within(self.store.limits.grace)
        self.heartbeat.beat()

    def stop(self, meanwhile: Callable[[], None]) -> None:
        """Finish and write, stage by stage, what ends in time. `meanwhile` is called while a stage ends."""
        self._shutdown.set()
        for name, service in self._services.items():
            service.stop()
            self.drain.wait_for(self._threads[name], meanwhile)

    def abandon(self) -> None:
        """Start no more work, and do not wait for running work."""
        self._shutdown.set()
        self.fetch.stop()

    def requeue(self, meanwhile: Callable[[], None]) -> None:
        """Return all held jobs to their queues, and publish that the worker is gone.

        `meanwhile` is called once Celery was asked to return the messages that it received.
        """
        self.held.requeue(self.held.all())
        meanwhile()
        self.held.requeue_messages()
        self.heartbeat.retire()

    @property
    def computes(self) -> bool:
        """Whether the device thread is running."""
        return self._threads["device"].is_alive()

    def _marked(self) -> None:
        """Wake the device for ended jobs; publish at once if it still runs them, as the store no longer counts that."""
        self._jobs.wake()
        if self._device.use.occupied(time.monotonic()):
            self.heartbeat.beat()

    def _reclaimed(self, grace: float) -> None:
        """Drain and exit: the machine will be gone in `grace` seconds."""
        begins = not self.drain.begun
        self.drain.within(grace)
        if begins:
            extra = {"grace": grace, "held": len(self.held)}
            logger.warning("reclaim notice; worker drains and exits", extra=extra)
            self.heartbeat.beat()
            self._celery.exit(os.EX_OK)


def open_class_queue(context: WorkerContext, name: str) -> ClassQueue:
    """The class queues that the worker consumes."""
    return ClassQueue(
        context.settings.broker,
        name,
        context.topology.limits,
        ahead=ahead_of(context.hardware),
        affinity=context.hardware.endpoint is not None,
    )


def start_thread(name: str, body: Callable[[], Any]) -> threading.Thread:
    """Start a thread; if its body fails, the process exits, so that its supervisor starts another."""

    def guarded() -> None:
        try:
            body()
        except BaseException:
            try:
                logger.critical("worker thread failed", extra={"loop": name}, exc_info=True)
            finally:
                os._exit(BROKEN)

    thread = threading.Thread(target=guarded, name=f"taxiway-{name}", daemon=True)
    thread.start()
    return thread


def _drive_device(context: WorkerContext, device: Device, shared: Shared) -> tuple[DeviceDriver, DeviceQueue]:
    """What drives a device of this machine, and its queue."""
    artefacts, threads = ArtefactStore(context.settings.cache), context.options.threads
    executor = Executor(context.hardware, device, artefacts, threads=threads, book=context.folder.book)
    jobs = DeviceQueue()
    return DeviceStage(jobs, Retries(shared, executor.runs_example).put, executor, shared), jobs


def _drive_endpoint(context: WorkerContext, device: Device, shared: Shared) -> tuple[DeviceDriver, DeviceQueue]:
    """What drives an endpoint, and its queue."""
    from workers.endpoints.http import EndpointConfigError  # workers of other devices start sooner without aiohttp
    from workers.endpoints.peers import Origin
    from workers.endpoints.stage import EndpointStage

    endpoint, folder = context.hardware.endpoint, context.folder
    assert endpoint is not None
    protocol = open_protocol(endpoint.protocol)
    variants = EndpointVariants(endpoint, protocol, device, folder.catalogue, folder.book)
    jobs = DeviceQueue()
    try:
        services, lease = tuple(context.topology.service), context.topology.limits.lease
        origin = Origin(context.topology.site, services, lease, shared.store.waiting_line, context.seal_keys)
        stage = EndpointStage(endpoint, protocol, context.options.endpoint_key, variants, jobs, shared, origin)
    except EndpointConfigError as error:
        raise _missing(context, str(error), "the paths are those on the worker's machine") from error

    def follow(topology: Topology) -> None:
        changed = topology.hardware[context.options.hardware_class].endpoint
        if changed is not None:
            stage.follow(changed)

    folder.queues.follow(follow)
    return stage, jobs


def _device(context: WorkerContext) -> Device:
    options = context.options
    prices = {} if options.usd_per_hour is None else {options.hardware_class: options.usd_per_hour}
    try:
        device = find_device(context.hardware, options.device, emulate=options.emulate, port=options.engine_port)
        return replace(device, prices=prices)
    except DeviceMissingError as error:
        hint = "start the worker with --emulate to serve the class on the CPU"
        raise _missing(context, str(error), hint) from error


def _missing(context: WorkerContext, reason: str, hint: str) -> SystemExit:
    logger.critical("no device", extra={"class": context.options.hardware_class, "reason": reason})
    sys.stderr.write(f"{reason}\nhint: {hint}\n")
    return SystemExit(NO_DEVICE)


def _tune_collector() -> None:
    """Exclude long-lived objects from garbage collection, which took 30 of 100 µs of a worker's time per echo job."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 10, 10)
