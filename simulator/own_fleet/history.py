"""`python -m simulator.own_fleet.history`: what arrived at the fleet and what became of it, as a trace or job by job.

Data to stdout, everything else to stderr.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import msgspec

from simulator.traces import write_arrivals
from tasks.history import (
    JOB,
    NAMED,
    PRIORITIES,
    SETTLE,
    SLICE,
    STATES,
    Arrivals,
    assembled,
    hour_of,
    slice_of,
)
from taxiway.cli import MISSING, CommandError, exit_on_error
from taxiway.cli.address import find_store
from taxiway.cli.fleet import run
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import history_key

LAG = SLICE + 2 * SETTLE
"""Seconds in which a job that was accepted is in the history, while a router leads."""

_READ_WITHIN = 30.0  # seconds for one answer: an hour of arrivals may be many megabytes


class History:
    """The arrivals that the fleet keeps, with what became of them. Raises `BrokerUnavailableError`.

    The last `LAG` seconds are not in it yet, and count as unseen only once they are older.
    """

    def __init__(self, url: str) -> None:
        self._connections = ConnectionPool(url, server="state store", answer=_READ_WITHIN)

    def now(self) -> float:
        """The store's time."""
        seconds, microseconds = self._connections.call("TIME")
        return int(seconds) + int(microseconds) / 1e6

    def read_recent(self, since: float) -> Arrivals:
        """The jobs accepted since a time by the store's clock."""
        return self.read(since, self.now() - LAG)

    def read_day(self, day: datetime) -> Arrivals:
        """The jobs accepted on a UTC day by the store's clock."""
        begin = day.replace(tzinfo=UTC).timestamp()
        return self.read(begin, min(begin + 86400, self.now() - LAG))

    def read(self, begin: float, end: float) -> Arrivals:
        """The jobs accepted from `begin` until before `end`, by the store's clock."""
        slices: dict[int, bytes] = {}
        for hour, wanted in groupby(range(slice_of(begin), math.ceil(end), SLICE), hour_of):
            named = list(wanted)
            found = self._connections.calls(*(("HGET", history_key(hour), at) for at in named))
            slices |= {at: bytes(packed) for at, packed in zip(named, found, strict=True) if packed is not None}
        return assembled(slices, begin, end)

    def close(self) -> None:
        """Disconnect."""
        self._connections.close()


_EMPTY = "the leading router records arrivals 40 s after they came, and keeps them for limits.keep_history"


def day_of(text: str) -> datetime | None:
    """The day that a text such as 2026-11-27 names; None if it names none."""
    try:
        return datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        return None


@click.group()
def main() -> None:
    """What arrived at the fleet, and what became of it."""


@main.command()
@click.argument("day", type=click.DateTime(["%Y-%m-%d"]))
@click.option("--url", help="The state store, redis://… [TAXIWAY_BROKER, else the local fleet].")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Data directory of a local fleet [TAXIWAY_DATA, else .taxiway]."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per job, with what became of it.")
def export(day: datetime, url: str | None, data: Path | None, *, as_json: bool) -> None:
    """Print a UTC day's arrivals as a trace for `taxiway diff-config` and `simulate`, a CSV file."""
    arrivals = arrivals_of_day(url, data, day)
    if as_json:
        for job in _told(arrivals):
            click.echo(msgspec.json.encode(job))
    else:
        write_arrivals(arrivals, sys.stdout)


def arrivals_of_day(url: str | None, data: Path | None, day: datetime) -> Arrivals:
    """The arrivals of a UTC day; spans that were not observed are reported on stderr.

    Raises:
        CommandError: there are none.
    """
    arrivals = History(find_store(url, data, os.environ)).read_day(day)
    if not len(arrivals):
        raise CommandError(f"no arrivals are recorded on {day.date()}", hint=_EMPTY, code=MISSING)
    for begin, end in arrivals.unseen:
        span = " to ".join(datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S") for at in (begin, end))
        click.echo(f"warning: not recorded: {span} UTC", err=True)
    return arrivals


def _told(arrivals: Arrivals) -> Iterator[dict[str, Any]]:
    """Each job as a JSON object: names and states in words, null where a figure is unknown."""
    columns = {column: arrivals.jobs[column].tolist() for column in JOB.fields or ()}
    for values in zip(*columns.values(), strict=True):
        job = dict(zip(columns, values, strict=True))
        job |= {column: arrivals.names[column][job[column]] for column in NAMED}
        job |= {column: None for column in ("deadline", "seconds", "ran") if math.isnan(job[column])}
        job["priority"] = PRIORITIES[job["priority"]] if job["priority"] >= 0 else None
        yield job | {"state": STATES[job["state"]], "output": job["output"] if job["output"] >= 0 else None}


if __name__ == "__main__":
    with exit_on_error():
        run(main, "python -m simulator.own_fleet.history")
