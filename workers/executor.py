"""Loads variants on the device and runs batches on them: whole, or row by row."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from tasks.heartbeat import variant_key
from tasks.machine import memory_of_container
from tasks.models.artefacts import ArtefactError, ArtefactStore
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model, Variant
from tasks.models.profiles import KnownProfile, ProfileBook
from tasks.models.signature import bind
from tasks.topology import HardwareClass
from taxiway.contract.keys import PATIENT
from taxiway.errors import DeviceFaultError, ExecutionError, TaxiwayError, bounded
from workers.calling.channel import CallError, NotWantedError, OutOfMemoryError
from workers.decide.faults import DeviceLostError, Fault, describe, fault_of, text_of
from workers.decide.residency import NoRoomError, Resident, Uses, evict
from workers.device import Device, unfit
from workers.learned import DeviceVariants, Loaded
from workers.port import Interruptible, Item, ModelLoadError, Placed, Row, RowWatch, import_runtime, open_pipeline

logger = logging.getLogger(__name__)

RETRY_LOAD = 60.0
"""Seconds after which a failed load is retried: a download may work then."""

NOTICED = 0.002
"""Shortest patient run, in seconds, that leaves the processor to others: a shorter one hardly holds them up, and the
wake-up of another thread would prolong it."""

ELSEWHERE = frozenset({"echo", "python"})
"""Runtimes whose thread computes nothing: emulated models wait, and callables run in processes of their own."""

CPU_SHARE = 0.8
"""Fraction of a machine's memory for models, if the class sets no limit."""


Answer = Row | TaxiwayError | None
"""A row's answer or error; None for a row that has not run yet or is no longer wanted."""

Value = TypeVar("Value")


class Executor(DeviceVariants):
    """Loads variants within the device's memory, and runs batches on them. Only who has its turn, unless stated.

    `book` has profiles that predict batch times; variants that are not in it have those in model.yaml.
    """

    def __init__(
        self,
        hardware: HardwareClass,
        device: Device,
        artefacts: ArtefactStore,
        *,
        threads: int,
        book: ProfileBook | None = None,
    ) -> None:
        super().__init__()
        self.hardware = hardware
        self.device = device
        self.unavailable: dict[str, str] = {}
        self._artefacts = artefacts
        self._compiled = _compiled_for(device, artefacts.cache)
        self._threads = threads
        self._book = book or ProfileBook()
        self._uses: dict[str, Uses] = {}
        self._loaded: dict[str, Loaded] = {}
        self._retry_at: dict[str, float] = {}
        self._retired: list[Loaded] = []
        self._nicer = NicerThread(hardware.nice) if device.kind == "cpu" and hardware.nice else None
        self._budget = int(min(hardware.memory or device.memory, device.memory) * CPU_SHARE)
        here = int((memory_of_container() or psutil.virtual_memory().total) * CPU_SHARE)
        self._host_memory = min(self._budget, here) if device.kind == "cpu" else here

    def ready(self, model: Model, variant: str) -> Loaded | None:
        """The variant, if it is loaded as described by exactly this model. Thread-safe."""
        loaded = self._loaded.get(variant_key(model.id, variant))
        return loaded if loaded is not None and loaded.model is model else None

    def renew(self, catalogue: Catalogue, book: ProfileBook) -> None:
        """Switch to a new catalogue and profiles, and unload variants whose description changed or is gone.

        A variant in use takes no more jobs, and is unloaded when it is free (`sweep`).
        """
        self._catalogue, self._book = catalogue, book
        for key, loaded in list(self._loaded.items()):
            model, name = catalogue.models.get(loaded.model.id), key.partition("/")[2]
            if model is not None and _runs_alike(loaded.model, model, name):
                loaded.model, loaded.variant, loaded.known = model, model.variants[name], self._look_up(model, name)
            else:
                self._retired.append(self._loaded.pop(key))
                self._tracks.pop(key, None)
                self._uses.pop(key, None)
        self.unavailable.clear()  # retry at once: a repaired variant loads, any other fails again with its reason
        self.sweep()

    def lacks(self, key: str, reason: str) -> None:
        """Record that a requested variant is not in this worker's catalogue. Thread-safe."""
        self._retry_at[key] = math.inf
        self.unavailable[key] = reason

    def sweep(self) -> None:
        """Unload variants that are no longer in the catalogue or in use."""
        for loaded in [one for one in self._retired if not one.in_use]:
            self._retired.remove(loaded)
            loaded.runtime.unload()
            logger.info("unloaded", extra={"variant": loaded.key, "to_load": ""})

    def all_loaded(self) -> list[Loaded]:
        """Every loaded variant. Thread-safe."""
        return list(self._loaded.values())

    def memory_used(self) -> int:
        """Bytes held by loaded variants. Thread-safe."""
        return sum(_memory(loaded) for loaded in (*self.all_loaded(), *self._retired))

    def load(self, model: Model, variant: str) -> Loaded:
        """Load and warm up the variant, unloading others for its memory.

        Raises:
            ExecutionError: it cannot be loaded here; gives the reason, which is also kept in `unavailable`.
            InUseError: the memory it needs is in use.
        """
        loaded = self.ready(model, variant)
        if loaded is None:
            self.make_space(model, variant)
            loaded = self.open(model, variant)
            self.keep(loaded)
        return loaded

    def make_space(
        self, model: Model, variant: str, *, keeping: Collection[str] = (), sparing: bool = False
    ) -> Sequence[Resident]:
        """Unload the least valuable variants until there is memory, and return them; never one in use or in `keeping`.

        `sparing` keeps those that urgent rows use, too.

        Raises:
            ExecutionError: it cannot be loaded here; gives the reason, which is also kept in `unavailable`.
            InUseError: the memory it needs is in use.
        """
        key, described = variant_key(model.id, variant), model.variants[variant]
        if key in self.unavailable and time.monotonic() < self._retry_at[key]:
            raise self._unavailable(key)
        try:
            if described.runtime not in self.device.runtimes:
                raise ModelLoadError(f"{described.runtime} is not installed")
            leaving = evict(self._residents(keeping), described.memory, self._budget, time.monotonic(), sparing=sparing)
        except (ModelLoadError, NoRoomError) as error:
            raise self._give_up(key, error) from error
        for other in leaving:
            self.unload(self._loaded[other.variant])
            logger.info("unloaded", extra={"variant": other.variant, "to_load": key})
        return leaving

    def open(self, model: Model, variant: str) -> Loaded:
        """Load and warm up a variant that fits the memory; the caller then registers it with `keep`. Thread-safe.

        Raises:
            ExecutionError: it cannot be loaded here; gives the reason, which is also kept in `unavailable`.
        """
        key = variant_key(model.id, variant)
        try:
            return self._open(key, model, variant)
        except BaseException as error:  # runtimes and models raise what they like, SystemExit too
            raise self._give_up(key, error) from error

    def keep(self, loaded: Loaded) -> None:
        """Register an opened variant, so that batches run on it."""
        self.unavailable.pop(loaded.key, None)
        self._loaded[loaded.key] = loaded
        self.loaded_in(loaded, computes=self.device.kind == "cpu")
        self._count_use(loaded.key)
        logger.info("loaded", extra={"variant": loaded.key, "seconds": round(loaded.seconds, 3)})

    def unload(self, loaded: Loaded) -> None:
        """Unload a variant and free its memory."""
        self._loaded.pop(loaded.key, None)
        loaded.runtime.unload()

    def used(self, loaded: Loaded, level: int) -> None:
        """Note a use, whose most urgent row has this level: uses and `seconds` decide which variants stay loaded."""
        loaded.ran, loaded.urgent = True, loaded.urgent or level < PATIENT
        self._count_use(loaded.key)

    def _count_use(self, key: str) -> None:
        self._uses[key] = self._uses.get(key, Uses()).once_more(time.monotonic())

    def warm_up(self, model: Model) -> None:
        """Load one variant of `model` in advance: the fastest, by profile, that can be loaded."""
        for name in self.fastest_first(model):
            try:
                self.load(model, name)
            except ExecutionError:
                continue  # `load` has logged why, and the heartbeat reports it
            return
        logger.warning("no variant of a warm model runs here", extra={"model": model.id})

    def fastest_first(self, model: Model) -> list[str]:
        """The model's variants that can run here, the fastest first by their profiles."""
        rows = self.hardware.max_batch
        able = [(self.known(model, name).profile, name) for name, v in model.variants.items() if self._can_run(v)]
        return [name for profile, name in sorted(able, key=lambda a: (a[0].latency(rows, model.expected_size), a[1]))]

    def runs_example(self, key: str) -> bool:
        """Whether a variant can answer its model's first example; False if it is not loaded or has no example."""
        loaded = self._loaded.get(key)
        if loaded is None or not loaded.model.examples:
            return False
        try:
            _warm_up(loaded, self._artefacts)
        except BaseException as error:  # runtimes and models raise what they like, SystemExit too
            logger.warning("model's example failed", extra={"variant": key, "error": bounded(describe(error))})
            return False
        return True

    def run(self, loaded: Loaded, items: Sequence[Item]) -> list[Row | TaxiwayError]:
        """An answer or an error for each item, in order; a failed item does not affect the others."""
        level = min(item.level for item in items)
        self.used(loaded, level)
        started = time.monotonic()
        try:
            compute = partial(loaded.pipeline.run, loaded.runtime, items)
            seconds = 0.0 if loaded.variant.runtime in ELSEWHERE else self.predicted(loaded, items)
            answers = self.at_level(level, seconds, compute)
        except BaseException as error:  # a model's own code may raise anything, SystemExit too
            failed = as_ours(loaded.key, error)
            if len(items) == 1:
                return [failed]
            extra = {"variant": loaded.key, "rows": len(items), "error": failed.message}
            logger.warning("batch failed; running its halves separately", extra=extra)
            half = len(items) // 2
            return [*self.run(loaded, items[:half]), *self.run(loaded, items[half:])]
        self.observe(loaded, items, answers, rows=len(items), seconds=time.monotonic() - started)
        return list(answers)

    def at_level(self, level: int, seconds: float, compute: Callable[[], Value]) -> Value:
        """The value of `compute`, which computes for about so many seconds, and whose most urgent job has this level.

        Patient work leaves the processor to what others of this machine do for somebody who waits.
        """
        if self._nicer is None or level < PATIENT or seconds < NOTICED:
            return compute()
        return self._nicer.run(compute)

    def _open(self, key: str, model: Model, name: str) -> Loaded:
        variant = model.variants[name]
        files = self._artefacts.files(model, name)
        placed = Placed(
            variant=key,
            precision=variant.precision,
            entry=variant.entry,
            files=files,
            device=self.device.address,
            threads=self._threads,
            compiled=self._compiled,
            memory=variant.limits.memory or self._host_memory,
            folder=model.folder,
        )
        opener = import_runtime(variant.runtime)
        began = time.monotonic()
        runtime = opener(placed)
        runtime.load()
        try:
            pipeline = open_pipeline(model, variant, placed)
            loaded = Loaded(key, model, variant, pipeline, runtime, self.known(model, name), 0.0)
            _warm_up(loaded, self._artefacts)
        except BaseException:
            runtime.unload()
            raise
        loaded.seconds = time.monotonic() - began
        return loaded

    def _residents(self, keeping: Collection[str]) -> list[Resident]:
        retired = [Resident(one.key, _memory(one), Uses(), one.seconds, in_use=True) for one in self._retired]
        return retired + [
            Resident(
                one.key, _memory(one), self._uses[one.key], one.seconds, one.in_use or one.key in keeping, one.urgent
            )
            for one in self._loaded.values()
        ]

    def _give_up(self, key: str, error: BaseException) -> ExecutionError:
        """Record why the variant cannot be loaded; returns the error to raise."""
        known = isinstance(error, (ModelLoadError, ArtefactError, NoRoomError, TaxiwayError))
        self._retry_at[key] = time.monotonic() + RETRY_LOAD
        self.unavailable[key] = bounded(text_of(error) if known else describe(error))
        logger.error("cannot load", extra={"variant": key, "reason": self.unavailable[key]}, exc_info=not known)
        return self._unavailable(key)

    def _unavailable(self, key: str) -> ExecutionError:
        return ExecutionError(f"{key} is unavailable on this device: {self.unavailable[key]}", variant=key)

    def _can_run(self, variant: Variant) -> bool:
        allowed = variant.runtime in self.hardware.runtimes and variant.memory <= self._budget
        return allowed and not unfit(variant, self.device)

    def known(self, model: Model, name: str) -> KnownProfile:
        """The variant's profile on this device, loaded or not. Thread-safe."""
        loaded = self.ready(model, name)
        return self._look_up(model, name) if loaded is None else loaded.known

    def _look_up(self, model: Model, name: str) -> KnownProfile:
        return self._book.lookup(model, name, self.device.kind, self.device.name)


def _runs_alike(one: Model, other: Model, variant: str) -> bool:
    """Whether a variant loaded from one description behaves the same under another."""
    if one is other:
        return True
    return variant in other.variants and _what_runs(one, variant) == _what_runs(other, variant)


def _what_runs(model: Model, variant: str) -> tuple[Any, ...]:
    """Everything that determines a loaded variant's answers."""
    runs = msgspec.structs.replace(model.variants[variant], profiles={}, accuracy=None)
    pipeline = (model.pipeline, model.inputs, model.outputs, model.parameters, model.size_unit, model.buckets)
    return (runs, model.artefacts, *pipeline)


def most_rows(hardware: HardwareClass, variant: Variant) -> int:
    """Most rows of a variant in one batch of the class."""
    return min(hardware.max_batch, variant.max_batch or hardware.max_batch)


STALL = 20.0
"""A batch that takes this multiple of its predicted time, plus `limits.stall`, counts as hung.

`limits.stall` is minutes because the first use compiles.
"""


def time_limit(loaded: Loaded, items: Sequence[Item]) -> float:
    """The batch's time limit in seconds, from its model's own profile."""
    profile = next(iter(loaded.variant.profiles.values()))
    size = sum(item.size for item in items) / len(items)
    return STALL * profile.latency(len(items), size)


def _compiled_for(device: Device, cache: Path) -> Path:
    """The folder of programs compiled for this type of device: others may lack its instructions."""
    kind = "\n".join((device.kind, device.name, *device.instruction_sets))
    return cache / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:16]


def _memory(loaded: Loaded) -> int:
    return max(loaded.runtime.memory(), loaded.variant.memory)


def _warm_up(loaded: Loaded, artefacts: ArtefactStore) -> None:
    """Run the model's first example once, with minimal parameters, so that no caller pays for first use."""
    for example in loaded.model.examples[:1]:
        inputs = artefacts.example(loaded.model, example)
        bound = bind(loaded.model, inputs, briefest(loaded.model))
        loaded.pipeline.run(loaded.runtime, [loaded.pipeline.prepare(bound.rows[0], bound.parameters)])


def briefest(model: Model) -> dict[str, Any]:
    """The model's parameters set for the least work."""
    return {
        name: int(spec.minimum)
        for name, spec in model.parameters.items()
        if spec.type == "integer" and spec.minimum is not None
    }


def as_ours(variant: str, error: BaseException) -> TaxiwayError:
    """Our error for any exception of a variant: SystemExit and the like end the job, not the worker.

    Raises:
        DeviceLostError: the exception means that the device is lost.
    """
    cause = error.__cause__ if isinstance(error, TaxiwayError) else error
    fault = fault_of(cause) if isinstance(cause, Exception) else None
    if fault is Fault.LOST:
        raise DeviceLostError(f"{variant}: {text_of(error)}") from error
    if fault is Fault.MEMORY:
        message = f"{variant}: the device is out of memory: {text_of(error)}"
        return DeviceFaultError(message, variant=variant, retry_after=1.0)
    if isinstance(error, TaxiwayError):
        return error
    return ExecutionError(f"{variant}: {describe(error)}", variant=variant)


def run_rows(
    executor: Executor, loaded: Loaded, runtime: Interruptible, rows: Sequence[tuple[Item, RowWatch]]
) -> list[Answer]:
    """Run a batch row by row, on a runtime that can interrupt single rows: each row succeeds or fails alone.

    Returns an answer for each row, in order. If the runtime's process dies, the remaining rows have not run.
    """
    executor.used(loaded, min(item.level for item, _ in rows))
    answers: list[Answer] = [None] * len(rows)
    failed: set[str] = set()
    seconds = 0.0
    for index, (item, watch) in enumerate(rows):
        if not runtime.alive:
            break
        if watch.job in failed:
            continue  # its job has ended with another row
        began = time.monotonic()
        answers[index] = answer = _run_row(loaded, runtime, item, watch)
        if isinstance(answer, TaxiwayError):
            failed.add(watch.job)
        elif answer is not None:
            seconds += time.monotonic() - began
    both = zip(rows, answers, strict=True)
    good = [(item, one) for (item, _), one in both if one is not None and not isinstance(one, TaxiwayError)]
    if good:
        items, given = zip(*good, strict=True)
        executor.observe(loaded, items, given, rows=len(items), seconds=seconds)
    return answers


def _run_row(loaded: Loaded, runtime: Interruptible, item: Item, watch: RowWatch) -> Answer:
    if not watch.wanted():
        return None
    runtime.watch = watch
    try:
        (answer,) = loaded.pipeline.run(loaded.runtime, [item])
    except NotWantedError:
        logger.info("a call was ended", extra={"variant": loaded.key, "job": watch.job})
        return None
    except TaxiwayError as error:
        cause = error.__cause__
        if isinstance(cause, OutOfMemoryError) and cause.calls > 0 and not item.starved:  # earlier rows may have leaked
            item.starved = True
            return None
        return _failed(loaded, watch.job, error)
    except BaseException as error:  # a pipeline's own code may raise anything, SystemExit too
        return _failed(loaded, watch.job, ExecutionError(f"{loaded.key}: {describe(error)}"))
    finally:
        runtime.watch = None
    return answer


def _failed(loaded: Loaded, job: str, error: TaxiwayError) -> TaxiwayError:
    """Return the error after logging it with the callable's traceback."""
    traceback = error.__cause__.traceback if isinstance(error.__cause__, CallError) else ""
    extra = {"job": job, "variant": loaded.key, "error": error.message}
    logger.warning("a callable failed", extra=extra | ({"traceback": traceback} if traceback else {}))
    return error


class NicerThread:
    """A thread that computes at a lower CPU priority than the rest of the process: it runs one call after another.

    On Linux niceness belongs to a thread, and only a privileged process may lower it again: hence a separate thread. It
    is a daemon, because a worker that abandons a running batch must end; a `ThreadPoolExecutor` would wait for it.
    """

    def __init__(self, nice: int) -> None:
        self._nice = nice
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], Value]) -> Value:
        """The value of `call`, or what it raises. Only who has the device's turn."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="taxiway-patient", daemon=True)
            self._thread.start()
        answer: Future[Value] = Future()
        self._calls.put((call, answer))
        return answer.result()

    def _run(self) -> None:
        if sys.platform == "linux":
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + self._nice)
        while True:
            call, answer = self._calls.get()
            try:
                answer.set_result(call())
            except BaseException as error:  # the caller's to handle
                answer.set_exception(error)
