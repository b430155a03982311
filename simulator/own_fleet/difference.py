"""What a history costs and attains under two files of a fleet: replays of both, compared, as a table or JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from rich.table import Table
from rich.text import Text

from simulator.engine import OutcomeColumns, RunSummary
from simulator.own_fleet.known import replayable, under
from simulator.reports import percent, table
from simulator.tuning.real_fleet import KnownFleet
from simulator.workload import Workload
from tasks.history import Arrivals

Asked = tuple[str, str]
"""A model, without its version, and a service by its name in queues.yaml."""

Play = Callable[[Workload, str], tuple[RunSummary, OutcomeColumns]]
"""Plays a workload; the text names the replay."""


@dataclass(frozen=True, slots=True)
class FileReplay:
    """One file's replay: its figures, requests by what they asked for, how many of those were in time.

    What the fleet cannot run counts as not in time.
    """

    summary: RunSummary
    requests: Mapping[Asked, int]
    timely: Mapping[Asked, int]


class Attained(msgspec.Struct, frozen=True, kw_only=True):
    """The shares in time of a model's requests of one service."""

    model: str
    service: str
    requests: int
    old: float
    new: float


_DOLLARS = {"cost_usd": "cost", "starts_usd": "cost of starts", "idle_usd": "cost of idle devices", "score": "score"}


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `diff-config` prints."""

    old: RunSummary
    new: RunSummary
    difference: dict[str, Any]
    """New minus old of `_DOLLARS` and of `usd_by_class`. A class absent in one cost nothing there."""
    attained: list[Attained]


def difference(arrivals: Arrivals, old: KnownFleet, new: KnownFleet, play: Play) -> Comparison:
    """The arrivals under both files. Raises `CommandError` if one of the fleets can run none of them."""
    before = replayed(under(arrivals, old.topology, old.topology), old, lambda load: play(load, "old"))
    return compared(before, replayed(under(arrivals, old.topology, new.topology), new, lambda load: play(load, "new")))


def replayed(
    arrivals: Arrivals, known: KnownFleet, play: Callable[[Workload], tuple[RunSummary, OutcomeColumns]]
) -> FileReplay:
    """The arrivals on one fleet. Raises `CommandError` if it can run none of them."""
    found, jobs = replayable(arrivals, known), arrivals.jobs
    summary, outcome = play(found.workload)
    services = arrivals.names["service"]
    every = jobs["model"].astype(np.int64) * len(services) + jobs["service"]
    good = every[found.rows[outcome.in_time(found.workload)]]
    requests, timely = dict[Asked, int](), dict[Asked, int]()
    for kind in np.unique(every).tolist():
        model, service = divmod(kind, len(services))
        asked = arrivals.names["model"][model].partition(":")[0], services[service]
        requests[asked] = requests.get(asked, 0) + int((every == kind).sum())
        timely[asked] = timely.get(asked, 0) + int((good == kind).sum())
    return FileReplay(summary, requests, timely)


def compared(old: FileReplay, new: FileReplay) -> Comparison:
    """Both replays and their difference; models and services with most requests first."""
    attained = []
    for asked, count in sorted(old.requests.items(), key=lambda one: (-one[1], one[0])):
        before, after = (one.timely.get(asked, 0) / count for one in (old, new))
        attained.append(Attained(model=asked[0], service=asked[1], requests=count, old=before, new=after))
    return Comparison(old=old.summary, new=new.summary, difference=_change(old.summary, new.summary), attained=attained)


def _change(old: RunSummary, new: RunSummary) -> dict[str, Any]:
    classes = dict.fromkeys([*old.usd_by_class, *new.usd_by_class])
    by_class = {name: new.usd_by_class.get(name, 0.0) - old.usd_by_class.get(name, 0.0) for name in classes}
    return {name: getattr(new, name) - getattr(old, name) for name in _DOLLARS} | {"usd_by_class": by_class}


def difference_tables(found: Comparison) -> tuple[Table, Table]:
    """What both cost, in all and by class; then the shares in time by model and service."""
    dollars = table(first="", right=("old", "new", "difference"))
    for row in _dollar_rows(found):
        dollars.add_row(*map(Text, row))
    shares = table("model", "service", right=("requests", "in time: old", "new", "difference"))
    for one in found.attained:
        change = f"{_rounded(100 * (one.new - one.old), 1):+.1f} points"
        cells = [f"{one.requests:,}", percent(one.old), percent(one.new), change]
        shares.add_row(*map(Text, [one.model, one.service, *cells]))
    return dollars, shares


def _dollar_rows(found: Comparison) -> Iterator[tuple[str, ...]]:
    digits = 2 if max(found.old.cost_usd, found.new.cost_usd) >= 1 else 4
    both = (msgspec.structs.asdict(one) for one in (found.old, found.new))
    old, new, change = map(_labelled, (*both, found.difference))
    for label, dollars in change.items():
        yield label, _dollars(old.get(label), digits), _dollars(new.get(label), digits), _signed(dollars, digits)


def _labelled(column: Mapping[str, Any]) -> dict[str, float]:
    """The US dollars of one column, by the row's label."""
    rows = {label: float(column[field]) for field, label in _DOLLARS.items()}
    return rows | {f"cost of {name}": dollars for name, dollars in column["usd_by_class"].items()}


def _dollars(value: float | None, digits: int) -> str:
    return "–" if value is None else f"${_rounded(value, digits):.{digits}f}"


def _signed(dollars: float, digits: int) -> str:
    rounded = _rounded(dollars, digits)
    return f"{'-' if rounded < 0 else '+'}${abs(rounded):.{digits}f}"


def _rounded(value: float, digits: int) -> float:
    """Rounded, and never minus zero."""
    return round(value, digits) + 0.0
