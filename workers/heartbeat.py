"""What a worker does each second: publishes the device's state, renews claims, and follows the models folder.

Claims are renewed for jobs that make progress. A worker that can do neither exits, so that its supervisor starts
another. Its name, by which claims, heartbeats and remote control address it, one live process has at a time.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from broker.valkey.worker_store import WorkerStore
from tasks.heartbeat import GONE_AFTER, HEARTBEAT, DeviceFacts, three_digits
from tasks.models.discovered import discovered_by
from tasks.models.folder import CHECK_EVERY, Reporter
from taxiway.backoff import Outage
from taxiway.errors import BrokerFullError, BrokerUnavailableError
from workers.device import WorkerContext, WorkerOptions, memory_free, utilisation
from workers.stages.outcomes import WorkerOutcomes
from workers.stages.queues import DeviceDriver, Shared

NAME_TAKEN = 4
"""Exit status of a worker whose name another live process has."""

_NAME_POLL = 0.25  # seconds between two looks at a name that is taken
_LAST_WORDS = 1  # commands that may still be on their way to the store when their process has been killed


def worker_name(chosen: str, default: str) -> str:
    """The full name of a worker: as in Celery, a name without a host gets this machine's."""
    name = chosen or default
    return name if "@" in name else f"{name}@{socket.gethostname()}"


class WorkerName:
    """One process's hold on its worker's name."""

    def __init__(self, store: WorkerStore) -> None:
        self._store = store
        self._left, self._prolonged = math.inf, 0  # seconds that the name is another's, and how often they became more
        self._process = f"process {os.getpid()} on {socket.gethostname()} ({secrets.token_hex(4)})"

    def take(self) -> None:
        """Take the name. That of a process that was killed is free after `GONE_AFTER` seconds, which this waits for.

        While the store is unavailable the name counts as free; `keep` looks again.

        Raises:
            SystemExit: another live process has it.
        """
        said = False
        while holder := self._other():
            if self._lives:
                sys.stderr.write(f"the worker name {self._store.worker!r} is taken by {holder}\nhint: {_HINT}\n")
                raise SystemExit(NAME_TAKEN)
            if not said:
                logger.info("waiting for the worker's name", extra={"worker": self._store.worker, "holder": holder})
            said = True
            time.sleep(min(_NAME_POLL, self._left))

    def keep(self) -> None:
        """Keep the name; the process exits if another live one has taken it, because this one was silent for long."""
        holder = self._other()
        if holder and self._lives:
            logger.critical("worker name lost; worker exits", extra={"worker": self._store.worker, "holder": holder})
            os._exit(NAME_TAKEN)

    def leave(self) -> None:
        """Let another process have the name at once."""
        self._store.hold_name(self._process, 0.0)

    @property
    def _lives(self) -> bool:
        """Whether the other process that has the name is alive, and not only what a store remembers of it."""
        return self._prolonged > _LAST_WORDS

    def _other(self) -> str:
        """The other process that has the name; empty if this one has it now."""
        try:
            holder, left = self._store.hold_name(self._process, GONE_AFTER)
        except BrokerUnavailableError:
            return ""
        if holder == self._process:
            self._left, self._prolonged = math.inf, 0
            return ""
        self._prolonged += left > self._left
        self._left = left
        return holder


_HINT = (
    "a device has one worker; to run this one beside it, give it a name of its own: "
    "--name NAME, or -n NAME@%h of `celery worker`"
)


logger = logging.getLogger(__name__)

RENEWALS = 3
"""Renewals of a claim within its lease: two may be lost."""

KEEP = 30.0
"""Seconds between two saves of what was learned."""

HUNG = 75
"""Exit status of a worker with a hung batch (EX_TEMPFAIL of sysexits.h): its jobs run elsewhere."""

STUCK = 120.0
"""Seconds after which a process in which no Python thread runs is ended, with all tracebacks on stderr."""

UNREACHED = 300.0
"""Seconds without an answer from the store after which an idle worker exits: a new one resolves the address again."""


class Heartbeat:
    """One device's heartbeat. The file `options.alive` is touched after each one that the store accepted."""

    def __init__(self, device: DeviceDriver, shared: Shared, counters: WorkerOutcomes, options: WorkerOptions) -> None:
        self._device = device
        self._shared = shared
        self._options = options
        self._counters = counters
        self._answered_at = time.monotonic()
        self.name = WorkerName(shared.store)
        due = self._shared.store.limits.lease / RENEWALS
        self._kept_at, self._memory = time.monotonic(), b""
        self._period = min(HEARTBEAT, due)
        self._young = due - self._period
        self._stopped = threading.Event()
        self._retired = False
        self._outage = Outage(logger, "no heartbeat")
        self._seen = (time.monotonic(), 0.0)
        self.facts = self._look()

    def run(self) -> None:
        """Beat until stopped."""
        beat_at = time.monotonic() + HEARTBEAT
        while not self._stopped.wait(self._period):
            expect_life(STUCK)
            self._watch()
            if not self._retired:
                self.name.keep()
            kept = self._call(lambda: self._shared.held.renew(self._young))
            if self._retired and kept:
                self._touch()
            elif time.monotonic() >= beat_at and not self._retired:
                beat_at = time.monotonic() + HEARTBEAT
                self.beat()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Publish the facts now."""
        self.facts = self._look()
        if self._call(lambda: self._shared.store.beat(self.facts)):
            self._touch()
        if time.monotonic() - self._kept_at > KEEP:
            self._keep()

    def retire(self) -> None:
        """Delete the facts, leave the worker's name, and publish no more."""
        self._retired = True
        self._keep()
        self._call(self._shared.store.retire)
        self._call(self.name.leave)

    def stop(self) -> None:
        """End `run`."""
        self._stopped.set()

    def shown(self) -> dict[str, Any]:
        """The last facts, for Celery's `inspect stats` and Flower, without the histograms."""
        plain: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(self.facts, done={}))
        return plain

    def _keep(self) -> None:
        """Save what was learned, for this process's successor."""
        self._kept_at = time.monotonic()
        key, memory = self._device.memory()
        if key and memory != self._memory and self._call(lambda: self._shared.store.keep_learned(key, memory)):
            self._memory = memory

    def _touch(self) -> None:
        """Touch the file for a container's health check."""
        if self._options.alive is not None:
            self._options.alive.touch()

    def _watch(self) -> None:
        """End the process when its batch hangs: its claims expire, and other workers take the jobs.

        An idle worker also ends when the store has not answered for `UNREACHED` seconds.
        """
        if time.monotonic() - self._answered_at > UNREACHED and not len(self._shared.held):
            logger.critical("state store unreachable; worker exits", extra={"seconds": UNREACHED})
            os._exit(HUNG)
        if self._device.hung(time.monotonic()):
            logger.critical(
                "batch or load hung; worker exits and its jobs run elsewhere", extra={"jobs": len(self._shared.held)}
            )
            os._exit(HUNG)

    def _call(self, call: Callable[[], Any]) -> bool:
        """Call the store; False if it did not answer. An outage is logged once."""
        try:
            call()
        except BrokerUnavailableError as error:
            self._outage.pause(error)
            if isinstance(error, BrokerFullError):
                self._answered_at = time.monotonic()
            return False
        self._outage.over()
        self._answered_at = time.monotonic()
        return True

    def _look(self) -> DeviceFacts:
        variants = self._device.variants
        device, loaded = variants.device, variants.all_loaded()
        served = {one.model.name for one in loaded}
        measured = utilisation(device)
        busy = self._busy_share()
        blocked, blocked_by = self._device.use.blocked(time.monotonic())
        return DeviceFacts(
            worker=self._shared.store.worker,
            hardware_class=self._options.hardware_class,
            device=device.label,
            kind=device.kind,
            emulated=device.emulated,
            name=device.name,
            memory_total=device.memory,
            memory_free=memory_free(device),
            memory_used=variants.memory_used(),
            utilisation=busy if measured is None else measured,
            instruction_sets=device.instruction_sets,
            runtimes=device.runtimes,
            warm=tuple(sorted(one.key for one in loaded)),
            unavailable=dict(variants.unavailable),
            held=len(self._shared.held),
            running=self._device.use.running,
            batch_age=three_digits(self._device.use.batch_age(time.monotonic())),
            occupied=three_digits(self._device.use.occupied(time.monotonic())),
            blocked=three_digits(blocked),
            blocked_by=blocked_by,
            blocking=self._device.use.blocking(time.monotonic()),
            serves=() if self._device.fault else self._served(),
            fault=self._device.fault,
            endpoint=self._device.endpoint,
            yieldable=self._device.yieldable,
            announced={name: one for name, one in variants.discovered.items() if name in served},
            draining=self._shared.drain.begun,
            joined=self._options.joined,
            opens=self._opens(),
            done=self._counters.totals(),
            usd_per_hour=device.prices.get(self._options.hardware_class),
            **variants.reported(loaded),
        )

    def _opens(self) -> tuple[str, ...]:
        """The keys that are here and, of another fleet, there."""
        peer = None if self._device.endpoint is None else self._device.endpoint.peer
        if peer is not None:
            return peer.keys
        return () if self._shared.seal_keys is None else self._shared.seal_keys.names

    def _served(self) -> tuple[str, ...] | None:
        """The classes that the worker serves, its own first, in the form of `DeviceFacts`."""
        own = self._options.hardware_class
        serves = tuple(sorted(self._shared.celery.queues(), key=lambda name: (name != own, name)))
        return None if serves == (own,) else serves

    def _busy_share(self) -> float:
        """Fraction of the time since the last heartbeat that the device was busy."""
        now = time.monotonic()
        computed = self._device.use.computed(now)
        then, had_computed = self._seen
        self._seen = (now, computed)
        return min(max((computed - had_computed) / max(now - then, 1e-9), 0.0), 1.0)


def expect_life(seconds: float) -> None:
    """End the process unless this is called again within `seconds`. Works even if no Python thread can run."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)


class ModelsWatch:
    """Checks the folder once a second, on its own thread."""

    def __init__(self, context: WorkerContext, device: DeviceDriver, store: WorkerStore) -> None:
        self._context, self._device = context, device
        self._store = store
        self._reporter = Reporter(context.folder.queues, "worker", store.worker)
        self._stopped = threading.Event()
        context.folder.follow(lambda catalogue, book: device.renew(catalogue, book, warm=context.warm()))

    def run(self) -> None:
        """Check until stopped."""
        self._context.folder.log_problems()
        while not self._stopped.is_set():
            self._report()
            variants = self._device.variants
            self._context.folder.discovered = discovered_by([(variants.device.runtimes[0], variants.discovered)])
            self._context.folder.look()
            self._stopped.wait(CHECK_EVERY)

    def stop(self) -> None:
        """End `run`. Any thread may call it."""
        self._stopped.set()

    def _report(self) -> None:
        """Report this worker."""
        try:
            self._reporter.apply(self._store.watch(self._reporter.arguments()))
        except BrokerUnavailableError as error:  # the heartbeat logs the outage; the folder is read anyway
            logger.debug("cannot report this worker", extra={"error": error.message})
