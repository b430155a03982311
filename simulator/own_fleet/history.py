"""`python -m simulator.own_fleet.history`: what arrived at the fleet and what became of it, summed up or as a trace.

Data to stdout, everything else to stderr.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from rich.table import Table
from rich.text import Text

from simulator.reports import percent, seconds, table
from simulator.traces import write_arrivals
from tasks.history import (
    ENDED,
    JOB,
    LAG,
    NAMED,
    PRIORITIES,
    SLICE,
    STATES,
    Arrivals,
    Jobs,
    assembled,
    hour_of,
    slice_of,
)
from taxiway.cli import MISSING, CommandError, exit_on_error
from taxiway.cli.address import find_store
from taxiway.cli.fleet import run
from taxiway.cli.show import stdout_console
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import history_key

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

    def read(self, begin: float, end: float) -> Arrivals:
        """The jobs accepted from `begin` until before `end`, by the store's clock as routers know it, to some ms."""
        slices: dict[int, bytes] = {}
        for hour, wanted in groupby(range(slice_of(begin), math.ceil(end), SLICE), hour_of):
            named = list(wanted)
            found = self._connections.calls(*(("HGET", history_key(hour), at) for at in named))
            slices |= {at: bytes(packed) for at, packed in zip(named, found, strict=True) if packed is not None}
        return assembled(slices, begin, end)

    def close(self) -> None:
        """Disconnect."""
        self._connections.close()


_DAY, _DATE = 86400.0, "%Y-%m-%d"
_EMPTY = f"the leading router records arrivals {LAG:g} s after they came, and keeps them for limits.keep_history"
_ANSWERED, _CANCELLED, _REFUSED = (STATES.index(state) for state in ("succeeded", "cancelled", "refused"))

_url = click.option("--url", help="The state store, redis://… [TAXIWAY_BROKER, else the local fleet].")
_data = click.option(
    "--data", type=click.Path(path_type=Path), help="Data directory of a local fleet [TAXIWAY_DATA, else .taxiway]."
)


def day_of(text: str) -> datetime | None:
    """The day that a text such as 2026-11-27 names; None if it names none."""
    try:
        return datetime.strptime(text, _DATE)
    except ValueError:
        return None


class EndedShare(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs of one model and service, and how they ended."""

    model: str
    service: str
    jobs: int
    open: int
    """Not ended."""
    answered: int
    failed: int
    """Those that expired included."""
    cancelled: int
    refused: int
    timely: float | None
    """Share answered within the deadline of those that ended and were not cancelled; None if there are none."""
    # Seconds that the answered ones took
    p50: float | None
    p95: float | None


def shares_of(arrivals: Arrivals) -> list[EndedShare]:
    """The jobs by model and service, those with most jobs first."""
    jobs = arrivals.jobs
    kinds = jobs["model"].astype(np.int64) * len(arrivals.names["service"]) + jobs["service"]
    shares = [_share(arrivals, jobs[kinds == kind]) for kind in np.unique(kinds)]
    return sorted(shares, key=lambda share: (-share.jobs, share.model, share.service))


def _share(arrivals: Arrivals, jobs: Jobs) -> EndedShare:
    state = jobs["state"]
    answered = state == _ANSWERED
    counted = int(((state >= ENDED) & (state != _CANCELLED)).sum())
    timely = int((answered & ~(jobs["seconds"] > jobs["deadline"])).sum())
    taken = jobs["seconds"][answered]
    return EndedShare(
        model=arrivals.names["model"][jobs["model"][0]],
        service=arrivals.names["service"][jobs["service"][0]],
        jobs=len(jobs),
        open=int((state < ENDED).sum()),
        answered=int(answered.sum()),
        failed=counted - int(answered.sum()) - int((state == _REFUSED).sum()),
        cancelled=int((state == _CANCELLED).sum()),
        refused=int((state == _REFUSED).sum()),
        timely=timely / counted if counted else None,
        p50=round(float(np.quantile(taken, 0.5)), 6) if len(taken) else None,
        p95=round(float(np.quantile(taken, 0.95)), 6) if len(taken) else None,
    )


@click.group(invoke_without_command=True)
@_url
@_data
@click.option("--day", type=click.DateTime([_DATE]), metavar="DAY", help="A UTC day [the last 24 hours].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def main(ctx: click.Context, url: str | None, data: Path | None, day: datetime | None, *, as_json: bool) -> None:
    """Sum up what arrived at the fleet, and what became of it, by model and service.

    docs/operations.md describes what is recorded.
    """
    if ctx.invoked_subcommand is not None:
        return
    arrivals = arrivals_of_day(url, data, day)
    shares = shares_of(arrivals)
    if as_json:
        click.echo(msgspec.json.encode({"shares": shares, "unseen": arrivals.unseen}))
    else:
        stdout_console().print(_table(shares))


@main.command()
@click.argument("day", type=click.DateTime([_DATE]), metavar="DAY")
@_url
@_data
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per job, with what became of it.")
def export(day: datetime, url: str | None, data: Path | None, *, as_json: bool) -> None:
    """Print a UTC day's arrivals as a trace for `taxiway diff-config` and `simulate`, a CSV file."""
    arrivals = arrivals_of_day(url, data, day)
    if as_json:
        for job in _told(arrivals):
            click.echo(msgspec.json.encode(job))
    else:
        write_arrivals(arrivals, sys.stdout)


def arrivals_of_day(url: str | None, data: Path | None, day: datetime | None) -> Arrivals:
    """The arrivals of a day, or of the last 24 hours; spans that were not observed are reported on stderr.

    Raises:
        CommandError: there are none.
    """
    history = History(find_store(url, data, os.environ))
    now = history.now()
    begin = now - _DAY if day is None else day.replace(tzinfo=UTC).timestamp()
    arrivals = history.read(begin, min(begin + _DAY, now - LAG))
    if not len(arrivals):
        when = "in the last 24 hours" if day is None else f"on {day.date()}"
        raise CommandError(f"no arrivals are recorded {when}", hint=_EMPTY, code=MISSING)
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


def _table(shares: Sequence[EndedShare]) -> Table:
    """The shares, without the columns in `_RARE` that are 0 in all rows: the others fit 80 columns."""
    unused = {name for name in _RARE if not any(getattr(share, name) for share in shares)}
    model, service, *rest = (name for name in EndedShare.__struct_fields__ if name not in unused)
    shown = table(model, service, right=rest)
    for share in shares:
        figures = {**msgspec.structs.asdict(share), "timely": percent(share.timely)}
        figures |= {"p50": seconds(share.p50), "p95": seconds(share.p95)}
        shown.add_row(*(Text(str(figure)) for name, figure in figures.items() if name not in unused))
    return shown


_RARE = ("open", "cancelled", "refused")


if __name__ == "__main__":
    with exit_on_error():
        run(main, "python -m simulator.own_fleet.history")
