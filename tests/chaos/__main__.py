"""`python -m tests.chaos`: injects faults into a fleet under load, and checks docs/guarantees.md."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import math
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from tests.chaos.batch import Batches
from tests.chaos.checker import Report, check
from tests.chaos.faults import FaultInjector
from tests.chaos.fleet import Fleet, orphans, running_fleet
from tests.chaos.history import Accepted, FaultInjected, Recorder, read_history
from tests.chaos.interfaces import CeleryInterface, ClientInterface, Interface
from tests.chaos.load import Load
from tests.chaos.plan import plan_faults
from tests.chaos.rabbit import SERVER
from tests.chaos.results import read_notes, read_store
from tests.chaos.workload import JobSpec, generate_jobs

BROKERS = ("valkey", "rabbitmq")
"""Where plain Celery's producers send: the fleet's own broker, or a RabbitMQ that routers bridge."""

LINES = 500
"""Of each batch."""

_TICK = 0.05


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a run with each broker.

    After the last fault a run goes on until every waiter has its result, or none got one for `quiet` seconds: a busy
    machine drains a backlog more slowly without losing any of it.
    """

    seconds: float
    jobs: int
    kills: int
    quiet: float


LONG = Size(seconds=450, jobs=50_000, kills=60, quiet=60)
SHORT = Size(seconds=90, jobs=5_000, kills=12, quiet=30)


def main() -> int:
    """Run once with each broker; 1 if a guarantee was violated."""
    given = _options().parse_args()
    asked = {name: getattr(given, name) for name in ("seconds", "jobs", "kills")}
    size = replace(SHORT if given.short else LONG, **{name: value for name, value in asked.items() if value})
    broken = False
    for broker in given.broker or BROKERS:
        if broker == "rabbitmq" and not SERVER.exists():
            _print_line({"broker": broker, "skipped": f"{SERVER} is not installed (Debian: rabbitmq-server)"})
            continue
        broken |= _run(broker, size, given.seed, given.keep)
    return int(broken)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a shorter run: five minutes in all")
    parser.add_argument("--seconds", type=float, help=f"of load and faults, with each broker ({LONG.seconds})")
    parser.add_argument("--jobs", type=int, help=f"with each broker ({LONG.jobs})")
    parser.add_argument("--kills", type=int, help=f"of workers, with each broker ({LONG.kills})")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="of the faults and the jobs")
    parser.add_argument("--broker", choices=BROKERS, action="append", help="only this one")
    parser.add_argument("--keep", type=Path, help="a folder for the history and the logs")
    return parser


def _run(broker: str, size: Size, seed: int, keep: Path | None) -> bool:
    """Run with one broker; whether a guarantee was violated."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name) if keep is None else keep / broker
        folder.mkdir(parents=True, exist_ok=True)
        history = folder / "history.jsonl"
        ends = _record(folder, history, broker, size, seed)
        events = list(read_history(history))
    report = check(events)
    for violation in report.violations[:20]:
        sys.stderr.write(f"{violation.guarantee}: job {violation.job}: {violation.why}\n")
    left = orphans(folder / "notes")
    line = _summary(broker, seed, report, [event for event in events if isinstance(event, FaultInjected)], ends, began)
    _print_line(line | {"processes left behind": len(left)})
    return bool(report.violations or left)


def _record(folder: Path, history: Path, broker: str, size: Size, seed: int) -> Counter[str]:
    """Inject faults into a fleet under load and record all events; returns how often each process exited how."""
    recorder = Recorder(history)
    with running_fleet(folder, rabbitmq=broker == "rabbitmq") as fleet:
        load = Load(lambda: _interfaces(fleet), recorder)
        numbers = itertools.count(size.jobs + 1)
        interfaces = list(_interfaces_of(fleet))
        injector = FaultInjector(fleet, recorder, lambda model: load.submit(JobSpec(next(numbers), interfaces, model)))
        for fault in plan_faults(seed, size.seconds, fleet.targets(), size.kills):
            injector.schedule(fault)
        batches = Batches(list(fleet.http.values()), LINES, recorder)
        load.start(list(generate_jobs(seed, size.jobs, interfaces)), size.seconds)
        _run_to_the_end(fleet, load, batches, injector, size)
        load.stop()
        batches.stop()
        jobs = {event.job: None for event in read_history(history) if isinstance(event, Accepted)}
        for _ in range(2):
            asyncio.run(read_store(fleet.store.primary.url, jobs, recorder))
        read_notes(fleet.notes, recorder)
        ends = fleet.processes.ends
    recorder.close()
    return ends


def _run_to_the_end(fleet: Fleet, load: Load, batches: Batches, injector: FaultInjector, size: Size) -> None:
    """Inject and repair faults until every job and line has its result, or none got one for a while."""
    until, fewest = math.inf, math.inf
    while not (load.settled and injector.done and not batches.left) and time.monotonic() < until:
        injector.poll()
        fleet.processes.poll()
        if load.all_submitted and injector.done:
            batches.finish()
        waiting = load.waiting + batches.left
        if load.all_submitted and injector.done and waiting < fewest:
            until, fewest = time.monotonic() + size.quiet, waiting
        time.sleep(_TICK)


def _interfaces_of(fleet: Fleet) -> tuple[str, ...]:
    own = ("client",) if fleet.rabbit is not None else ("client", "replicated client")
    return (*own, "celery", *fleet.http)


def _interfaces(fleet: Fleet) -> dict[str, Interface]:
    """Must be called in the event loop that uses them."""
    interfaces: dict[str, Interface] = {name: ClientInterface(url) for name, url in fleet.http.items()}
    interfaces["celery"] = CeleryInterface(fleet.amqp or fleet.settings.broker, fleet.settings.broker)
    interfaces["client"] = ClientInterface(fleet.settings.broker)
    if fleet.rabbit is None:
        interfaces["replicated client"] = ClientInterface(fleet.settings.broker, "replicated")
    return interfaces


def _summary(
    broker: str, seed: int, report: Report, injected: Sequence[FaultInjected], ends: Counter[str], began: float
) -> dict[str, Any]:
    return {
        "question": "guarantees under faults",
        "broker": broker,
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - began),
        **report.counts,
        "oldest loss in a failover": round(report.lost_age, 3),
        "faults": dict(Counter(f"{event.fault} {event.target}" for event in injected if not event.skipped)),
        "skipped": dict(Counter(f"{event.fault}: {event.skipped}" for event in injected if event.skipped)),
        "ends": dict(ends),
        "violations": len(report.violations),
    }


def _print_line(line: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
