"""Restarts the processes of a running fleet one after another: each is ready again before the next is asked to end.

A process is asked to end by SIGTERM, as `taxiway down` asks: a worker finishes its jobs or returns them. Its supervisor
starts it again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from local.fleet import LocalFleet, ProcessState, read_fleet
from local.plan import WorkerPlan
from local.supervisor import CHECK_EVERY
from local.up import START_PATIENCE
from taxiway.cli import MISSING, UNAVAILABLE, USAGE, CommandError

_BROKER = "broker"


def restarted(data: Path, named: str | None) -> Iterator[tuple[str, float]]:
    """Restart the processes of the fleet in `data`, or the one of that name, or the workers of that class.

    Yields each process that is ready again, with the seconds that it took. The embedded broker is left alone.

    Raises:
        CommandError: no fleet runs from there, nothing in it has that name, or a process does not come back.
    """
    fleet = _running(data)
    for process in chosen(fleet, named):
        began = time.monotonic()
        _restart(data, process, fleet.patience + START_PATIENCE)
        yield process.name, time.monotonic() - began


def chosen(fleet: LocalFleet, named: str | None) -> list[ProcessState]:
    """The fleet's processes, or the one of that name, or those of the class of that name: the router first.

    Raises:
        CommandError: there is none.
    """
    processes = [process for process in fleet.processes if process.name != _BROKER]
    if named is None:
        return processes
    workers = {WorkerPlan(one.hardware_class, one.device, one.emulated).name: one for one in fleet.workers}
    of_class = {name for name, worker in workers.items() if worker.hardware_class == named}
    found = [process for process in processes if process.name == named or process.name in of_class]
    if not found:
        known = ", ".join(sorted({*(p.name for p in processes), *(one.hardware_class for one in fleet.workers)}))
        hint = "`taxiway down` and `taxiway up` restart it, with everything else" if named == _BROKER else ""
        raise CommandError(
            f"expected a process or a class of this fleet ({known}), got {named!r}", hint=hint, code=USAGE
        )
    return found


def _restart(data: Path, process: ProcessState, patience: float) -> None:
    if process.pid is not None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, signal.SIGTERM)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        time.sleep(CHECK_EVERY)
        now = next((one for one in _running(data).processes if one.name == process.name), None)
        if now is None or (now.ready and now.pid != process.pid):  # none: an autoscaler needs it no longer
            return
        if now.last_exit is not None and now.last_exit != process.last_exit:
            why = f"{now.last_exit.why}: {now.last_exit.last_line}"
            raise CommandError(f"{process.name} {why}", hint=f"see {process.log}; it is started again", code=MISSING)
    raise CommandError(f"{process.name} is not ready after {patience:g} s", hint=f"see {process.log}", code=UNAVAILABLE)


def _running(data: Path) -> LocalFleet:
    fleet = read_fleet(data)
    if fleet is None:
        raise CommandError(f"no fleet runs from {data}", hint="`taxiway up --detach` starts one", code=UNAVAILABLE)
    return fleet
