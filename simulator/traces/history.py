"""The fleet's own arrivals (`router.history`) as a trace, and a trace as the lines of a generic CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from router.history.columns import REFUSED, Arrivals
from simulator.fleet import SERVICES
from simulator.traces.trace import GENERIC, OPTIONAL, PRIORITIES, UNSET, Column, Trace

_MOST = 999_999_999  # the largest size and output of a trace


def trace_of(arrivals: Arrivals) -> Trace:
    """The trace that replays these arrivals, as far as they were accepted: the size of a refused one is unknown.

    A request of several rows has the size of all of them. `output` is what was generated, or what was expected while
    that is unknown. A service that the simulator does not know is unset; such requests have their deadlines.
    """
    jobs = arrivals.jobs[arrivals.jobs["state"] != REFUSED]
    rows = jobs["rows"].astype(np.int64)
    services = [SERVICES.index(name) if name in SERVICES else UNSET for name in arrivals.names["service"]]
    return Trace(
        models=arrivals.names["model"],
        tenants=arrivals.names["tenant"],
        arrival=jobs["arrival"] - (jobs["arrival"][0] if len(jobs) else 0.0),
        model=jobs["model"].astype(np.int16),
        size=_bounded(rows * jobs["size"]),
        output=_bounded(rows * np.where(jobs["output"] >= 0, jobs["output"], jobs["expected"])),
        predicted=_bounded(rows * jobs["expected"]),
        deadline=jobs["deadline"].astype(np.float64),
        priority=jobs["priority"],
        service=np.array(services, np.int8)[jobs["service"]],
        tenant=jobs["tenant"].astype(np.int32),
    )


def _bounded(sizes: Column) -> Column:
    bounded: Column = np.minimum(sizes, _MOST).astype(np.int32)
    return bounded


class _Lines(Protocol):
    def write(self, text: str, /) -> object:
        """Take a line."""


def write_trace(trace: Trace, lines: _Lines) -> None:
    """Write a trace as a generic CSV file, as `read_trace` reads it. Models are named without their version."""
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow((*GENERIC, *OPTIONAL))
    writer.writerows(_records(trace))


def _records(trace: Trace) -> Iterator[tuple[object, ...]]:
    models = [name.partition(":")[0] for name in trace.models]
    for arrival, model, size, deadline, priority, tenant, output, service in zip(
        *(getattr(trace, name).tolist() for name in (*GENERIC, *OPTIONAL)), strict=True
    ):
        yield (
            f"{arrival:.6f}",
            models[model],
            size,
            "" if math.isnan(deadline) else f"{deadline:.7g}",
            "" if priority == UNSET else PRIORITIES[priority],
            trace.tenants[tenant],
            output,
            "" if service == UNSET else SERVICES[service],
        )
