"""An autoscaled fleet of real processes, run as `taxiway up --autoscale` runs it, and what its devices cost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from local.autoscaler import Ask, WorkerBounds, ask_router
from local.fleet import LocalFleet
from local.plan import plan_fleet
from local.up import UpOptions, run_fleet
from tasks.machine import look
from tasks.topology import load_topology

EVERY = 0.25
"""Seconds between two looks at which workers run."""

TIMEOUT = 120.0
"""Seconds within which the fleet must be ready, and gone afterwards."""


@dataclass(slots=True)
class Powered:
    """The seconds for which workers of each class ran, from their start to their exit, while `counting`."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counting: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a fleet runs: its folder, its files, and the most workers of each class; those of `emulated` on the CPU."""

    folder: Path
    queues: Path
    models: Path
    most: Mapping[str, int]
    emulated: tuple[str, ...]


@contextlib.contextmanager
def autoscaled(site: Site, ask: Ask = ask_router) -> Iterator[tuple[LocalFleet, Powered]]:
    """The fleet while the block runs. Workers are as many as `ask` says, more than cores if need be."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(site, ask, sender))
    process.start()
    sender.close()
    assert process.pid is not None
    try:
        if not receiver.poll(TIMEOUT):
            raise TimeoutError(f"the fleet is not ready within {TIMEOUT:g} s; see {site.folder}/logs")
        fleet: LocalFleet = receiver.recv()
        with _counted(process.pid) as powered:
            yield fleet, powered
    finally:
        process.terminate()
        process.join(TIMEOUT)
        process.kill()


def _run(site: Site, ask: Ask, sender: Connection) -> None:
    """The supervisor's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TAXIWAY_")},
        "TAXIWAY_QUEUES": str(site.queues),
        "TAXIWAY_MODELS": str(site.models),
        "OMP_NUM_THREADS": "1",
    }
    topology = load_topology(site.queues)
    plan = plan_fleet(topology, look(), emulate=site.emulated, counts=site.most)
    least = {name: hardware.scaling.minimum for name, hardware in topology.hardware.items()}
    options = UpOptions(data=site.folder, port=0, flower=False)
    run_fleet(lambda _: plan, options, environment, sender.send, WorkerBounds(least, sum(site.most.values())), ask)


@contextlib.contextmanager
def _counted(supervisor: int) -> Iterator[Powered]:
    """Counts the supervisor's workers in a thread."""
    powered, ended = Powered(), threading.Event()

    def count() -> None:
        last = time.monotonic()
        while not ended.wait(EVERY):
            before, last = last, time.monotonic()
            if powered.counting.is_set():
                for name, workers in running_workers(supervisor).items():
                    powered.seconds[name] += workers * (last - before)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield powered
    finally:
        ended.set()
        thread.join()


def running_workers(supervisor: int) -> Counter[str]:
    """The supervisor's worker processes, by class."""
    found: Counter[str] = Counter()
    for child in psutil.Process(supervisor).children():
        with contextlib.suppress(psutil.Error):
            command = child.cmdline()
            if "--class" in command and not {"workers", "local.engine"}.isdisjoint(command):
                found[command[command.index("--class") + 1]] += 1
    return found
