"""What a history costs and attains under two files of a fleet: replays of both, compared, as a table or JSON.

A long history is sampled: windows of it are replayed, and dollars scaled to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from simulator.engine import OutcomeColumns, RunSummary
from simulator.fleet import SERVICES
from simulator.own_fleet.known import ReplayError, replayable, under
from simulator.reports import percent, table
from simulator.tuning.real_fleet import KnownFleet
from simulator.workload import Workload
from tasks.history import Arrivals

SAMPLE_WINDOW = 450.0
"""Seconds of one window of a sample; there are two windows at least."""

Asked = tuple[str, str]
"""A model, without its version, and a service by its name in queues.yaml."""

Play = Callable[[Workload, str], tuple[RunSummary, OutcomeColumns]]
"""Plays a workload; the text names the replay."""


@dataclass(frozen=True, slots=True)
class FileReplay:
    """One file's replay: its figures, requests by what they asked for, how many of those were in time.

    `by_service` is the requests of each of the simulator's services. What the fleet cannot run counts as not in time.
    """

    summary: RunSummary
    requests: Mapping[Asked, int]
    timely: Mapping[Asked, int]
    by_service: NDArray[np.int64]

    def share(self, asked: Asked) -> float | None:
        """The share of these requests in time; None without any."""
        count = self.requests.get(asked, 0)
        return self.timely.get(asked, 0) / count if count else None


class Attained(msgspec.Struct, frozen=True, kw_only=True):
    """The shares in time of a model's requests of one service.

    `error` is two standard errors of the difference; null without a sample.
    """

    model: str
    service: str
    requests: int
    old: float
    new: float
    error: float | None = None


_DOLLARS = {"cost_usd": "cost", "starts_usd": "cost of starts", "idle_usd": "cost of idle devices", "score": "score"}


class FleetChange(msgspec.Struct, frozen=True, kw_only=True):
    """New minus old, in US dollars. A class absent in one cost nothing there."""

    cost_usd: float
    score: float
    starts_usd: float
    idle_usd: float
    usd_by_class: dict[str, float]


class ReplayedSample(msgspec.Struct, frozen=True, kw_only=True):
    """What was replayed of a history of `of` seconds: `windows` windows of `each` seconds, spread evenly.

    `error` is two standard errors of the differences, estimated from how the windows differ.
    """

    windows: int
    each: float
    of: float
    error: FleetChange


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `diff-config` prints. With a `sample`, dollars and requests are scaled to the whole history."""

    old: RunSummary
    new: RunSummary
    difference: FleetChange
    attained: list[Attained]
    sample: ReplayedSample | None = None


Pair = tuple[FileReplay, FileReplay]
"""A replay under the old file, and the same under the new one."""


def difference(arrivals: Arrivals, old: KnownFleet, new: KnownFleet, sample: float, play: Play) -> Comparison:
    """The arrivals under both files, or windows of them that are about `sample` seconds together; 0 for all.

    Raises:
        ReplayError: one of the fleets can run none of them, or none of those in one of the windows.
    """
    arrival = arrivals.jobs["arrival"]
    of = float(arrival[-1] - arrival[0])
    if not sample or of <= sample:
        return compared(_both(arrivals, old, new, play, ""))
    count = max(2, round(sample / SAMPLE_WINDOW))
    parts = windows_of(arrivals, count=count, each=sample / count)
    pairs = [_both(part, old, new, play, f" {number} of {len(parts)}") for number, part in enumerate(parts, 1)]
    if not pairs:
        raise ReplayError("nothing can be replayed: no request lies in the windows of the sample")
    return sampled(pairs, count=count, each=sample / count, of=of)


def windows_of(arrivals: Arrivals, *, count: int, each: float) -> list[Arrivals]:
    """`count` windows of `each` seconds, spread evenly over the arrivals; empty ones are left out."""
    arrival = arrivals.jobs["arrival"]
    stratum = float(arrival[-1] - arrival[0]) / count
    begins = [float(arrival[0]) + number * stratum + (stratum - each) / 2 for number in range(count)]
    spans = [np.searchsorted(arrival, (begin, begin + each)) for begin in begins]
    parts = [arrivals.jobs[first:last] for first, last in spans]
    return [replace(arrivals, jobs=jobs) for jobs in parts if len(jobs)]


def _both(arrivals: Arrivals, old: KnownFleet, new: KnownFleet, play: Play, which: str) -> Pair:
    before = replayed(under(arrivals, old.topology, old.topology), old, lambda load: play(load, f"old{which}"))
    return before, replayed(under(arrivals, old.topology, new.topology), new, lambda load: play(load, f"new{which}"))


def replayed(
    arrivals: Arrivals, known: KnownFleet, play: Callable[[Workload], tuple[RunSummary, OutcomeColumns]]
) -> FileReplay:
    """The arrivals on one fleet.

    Raises:
        ReplayError: it can run none of them.
    """
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
    return FileReplay(summary, requests, timely, np.bincount(found.workload.trace.service, minlength=len(SERVICES)))


def compared(pair: Pair) -> Comparison:
    """Both replays and their difference."""
    old, new = (one.summary for one in pair)
    return Comparison(old=old, new=new, difference=_change(old, new), attained=_attained([pair], 1.0, None))


def sampled(pairs: Sequence[Pair], *, count: int, each: float, of: float) -> Comparison:
    """Both files on the whole history, from old and new replays of `count` windows; empty windows have none."""
    scale = of / (count * each)
    old, new = (_scaled([pair[side] for pair in pairs], scale) for side in (0, 1))
    changes = [_change(*(one.summary for one in pair)) for pair in pairs]
    unseen = math.sqrt(max(1 - 1 / scale, 0.0))  # of a whole history that is replayed nothing is uncertain
    total = 2 * unseen * scale * math.sqrt(count)
    error = FleetChange(
        usd_by_class={
            name: total * _deviation([change.usd_by_class.get(name, 0.0) for change in changes], count)
            for name in dict.fromkeys(name for change in changes for name in change.usd_by_class)
        },
        **{name: total * _deviation([getattr(change, name) for change in changes], count) for name in _DOLLARS},
    )
    return Comparison(
        old=old,
        new=new,
        difference=_change(old, new),
        attained=_attained(pairs, scale, unseen),
        sample=ReplayedSample(windows=count, each=each, of=of, error=error),
    )


def _change(old: RunSummary, new: RunSummary) -> FleetChange:
    classes = dict.fromkeys([*old.usd_by_class, *new.usd_by_class])
    return FleetChange(
        usd_by_class={name: new.usd_by_class.get(name, 0.0) - old.usd_by_class.get(name, 0.0) for name in classes},
        **{name: getattr(new, name) - getattr(old, name) for name in _DOLLARS},
    )


def _attained(pairs: Sequence[Pair], scale: float, unseen: float | None) -> list[Attained]:
    """By model and service, those with most requests first; `unseen` is the part of a sample's error that remains."""
    found = []
    for asked in dict.fromkeys(asked for pair in pairs for asked in pair[0].requests):
        windows = [(old.share(asked), new.share(asked)) for old, new in pairs]
        changes = [after - before for before, after in windows if before is not None and after is not None]
        requests = sum(old.requests.get(asked, 0) for old, _ in pairs)
        before, after = (sum(pair[side].timely.get(asked, 0) for pair in pairs) / requests for side in (0, 1))
        error = None if unseen is None else 2 * unseen * _deviation(changes, len(changes)) / math.sqrt(len(changes))
        model, service = asked
        found.append(
            Attained(model=model, service=service, requests=round(scale * requests), old=before, new=after, error=error)
        )
    return sorted(found, key=lambda one: (-one.requests, one.model, one.service))


def _scaled(parts: Sequence[FileReplay], scale: float) -> RunSummary:
    """One summary of all windows: shares by requests, dollars times `scale`."""
    asked, summaries = np.array([part.by_service for part in parts]), [part.summary for part in parts]
    attainment: dict[str, float | None] = {}
    for number, name in enumerate(SERVICES):
        requests = asked[:, number]
        timely = sum((one.attainment[name] or 0.0) * int(n) for one, n in zip(summaries, requests, strict=True))
        attainment[name] = timely / int(requests.sum()) if requests.any() else None
    classes = dict.fromkeys(name for one in summaries for name in one.usd_by_class)
    return RunSummary(
        policy=summaries[0].policy,
        requests=round(scale * int(asked.sum())),
        attainment=attainment,
        usd_by_class={name: scale * sum(one.usd_by_class.get(name, 0.0) for one in summaries) for name in classes},
        **{name: scale * sum(getattr(one, name) for one in summaries) for name in _DOLLARS},
    )


def _deviation(values: Sequence[float], count: int) -> float:
    """The standard deviation of `count` values, of which those that are not given are 0."""
    return float(np.std([*values, *([0.0] * (count - len(values)))], ddof=1)) if count > 1 else 0.0


def sample_line(sample: ReplayedSample) -> str:
    """What was replayed, in words."""
    return (
        f"{sample.windows} windows of {sample.each:g} s of {sample.of / 3600:.1f} h were replayed; "
        "dollars are scaled to the whole, ± is two standard errors"
    )


def difference_tables(found: Comparison) -> tuple[Table, Table]:
    """What both cost, in all and by class; then the shares in time by model and service."""
    dollars = table(first="", right=("old", "new", "difference"))
    for row in _dollar_rows(found):
        dollars.add_row(*map(Text, row))
    shares = table("model", "service", right=("requests", "in time: old", "new", "difference"))
    for one in found.attained:
        change = f"{_rounded(100 * (one.new - one.old), 1):+.1f} points{_within(one.error, 100, 1)}"
        cells = [f"{one.requests:,}", percent(one.old), percent(one.new), change]
        shares.add_row(*map(Text, [one.model, one.service, *cells]))
    return dollars, shares


def _dollar_rows(found: Comparison) -> Iterator[tuple[str, ...]]:
    digits = 2 if max(found.old.cost_usd, found.new.cost_usd) >= 1 else 4
    old, new, change = (_labelled(one) for one in (found.old, found.new, found.difference))
    errors = {} if found.sample is None else _labelled(found.sample.error)
    for label, dollars in change.items():
        difference = _signed(dollars, digits) + _within(errors.get(label), 1, digits)
        yield label, _dollars(old.get(label), digits), _dollars(new.get(label), digits), difference


def _labelled(one: RunSummary | FleetChange) -> dict[str, float]:
    """The US dollars of one column, by the row's label."""
    rows = {label: float(getattr(one, field)) for field, label in _DOLLARS.items()}
    return rows | {f"cost of {name}": dollars for name, dollars in one.usd_by_class.items()}


def _within(error: float | None, times: float, digits: int) -> str:
    return "" if error is None else f" ± {times * error:.{digits}f}"


def _dollars(value: float | None, digits: int) -> str:
    return "–" if value is None else f"${_rounded(value, digits):.{digits}f}"


def _signed(dollars: float, digits: int) -> str:
    rounded = _rounded(dollars, digits)
    return f"{'-' if rounded < 0 else '+'}${abs(rounded):.{digits}f}"


def _rounded(value: float, digits: int) -> float:
    """Rounded, and never minus zero."""
    return round(value, digits) + 0.0
