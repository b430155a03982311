"""The history's columns, how a slice of them is stored, and which slices are due. Pure.

A slice has the jobs that were accepted within `SLICE` seconds. A slice without jobs is stored, too, as nothing: one
that is not stored was not observed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from taxiway.contract.request import Priority

SLICE = 10
"""Seconds of arrivals that are stored together; an hour has a whole number of slices."""

SETTLE = 2.0
"""Seconds after the end of a slice in which its last jobs are recorded."""

LAG = SLICE + 2 * SETTLE
"""Seconds in which a job that was accepted is in the history, while a router leads."""

OBSERVED_AGES = (120.0, 600.0, 3600.0, 21600.0, 86400.0)
"""Ages of a slice, in seconds, at which it is observed again while some of its jobs have not ended."""

PRIORITIES: tuple[Priority, ...] = get_args(Priority)

STATES = ("accepted", "queued", "held", "running", "succeeded", "failed", "expired", "cancelled", "dead", "refused")
"""A job's last known state, stored by number: `JobState`, and `refused` for one that was never placed."""

ENDED, REFUSED = STATES.index("succeeded"), STATES.index("refused")
"""The number of the first state in which a job has ended, and of the last."""
_EXPIRED = STATES.index("expired")

NAMED = ("model", "tenant", "service", "locality", "hardware_class")
"""Columns that index names."""

JOB = np.dtype(
    [
        *(("arrival", "<f8"), ("model", "<u2"), ("tenant", "<u4"), ("service", "<u2"), ("locality", "<u2")),
        *(("rows", "<u4"), ("size", "<u4"), ("expected", "<u4"), ("output", "<i4")),
        *(("deadline", "<f4"), ("priority", "i1")),
        *(("state", "u1"), ("hardware_class", "<u2"), ("seconds", "<f4"), ("ran", "<f4")),
    ]
)
"""The columns: one field of each job. Stored slices have the same fields, but `arrival` as `_STORED`."""

Jobs = NDArray[Any]


class ServiceLatency(msgspec.Struct, frozen=True, kw_only=True):
    """How long one service's jobs of one slice took from acceptance to their end. Times are in seconds."""

    begin: int
    """The slice's begin, in Unix seconds."""
    service: str
    jobs: int
    """Jobs that were accepted in the slice."""
    refused: int = 0
    """Requests that were refused for lack of hardware."""
    late: int
    """Those of them that were expired or answered after their deadline."""
    median: float | None
    """What half of the answered jobs took at most; None if none was answered."""
    slowest: float | None
    """What 95 % of the answered jobs took at most."""
    deadline: float | None
    """The median of the deadlines that jobs had; None if none had one."""


_STORED = "<u4"  # microseconds since the begin of the slice


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """Accepted jobs in order of arrival and what became of them: `jobs["size"]` is a column, of shape (n,).

    `arrival` is Unix time by the store's clock. `size` is the size of each of `rows` rows in the model's unit, without
    the answer, of which `expected` tokens were predicted and `output` generated (-1: unknown), on average of the rows.
    `deadline` is seconds from arrival, NaN if there is none; `priority` indexes `PRIORITIES` (-1: unknown), `state`
    `STATES`. `seconds` are those from arrival to the end, NaN if it has not ended; `ran` are those of them since its
    batch began, NaN if it did not. The columns `NAMED` index `names[column]`, where an empty name stands for none.
    `unseen` are the spans that were not observed (begin, end).
    """

    names: Mapping[str, tuple[str, ...]]
    jobs: Jobs
    unseen: tuple[tuple[float, float], ...] = ()

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def open(self) -> int:
        """How many of the jobs had not ended."""
        return int((self.jobs["state"] < ENDED).sum())


class PlacedTerms(NamedTuple):
    """What jobs asked for, as placement understood it."""

    service: str = ""
    locality: str = ""
    rows: int = 0
    size: int = 0
    expected: int = 0
    priority: int = -1


class UnservedTerms(NamedTuple):
    """What a request asked for that was refused for lack of hardware."""

    model: str
    tenant: str
    terms: PlacedTerms
    deadline: float | None


_read_unserved = msgspec.json.Decoder(UnservedTerms).decode


def unserved_text(asked: UnservedTerms) -> str:
    """The terms as stored."""
    return msgspec.json.encode(asked).decode()


def unserved(begin: int, counts: Mapping[str, int]) -> Arrivals:
    """The refused requests of a slice, from their stored terms. They are spread evenly over it."""
    asked = [_read_unserved(text) for text, count in counts.items() for _ in range(count)]
    texts = {
        "model": [one.model for one in asked],
        "tenant": [one.tenant for one in asked],
        "service": [one.terms.service for one in asked],
        "locality": [one.terms.locality for one in asked],
        "hardware_class": [""] * len(asked),
    }
    names, jobs = {column: tuple(dict.fromkeys(values)) for column, values in texts.items()}, np.zeros(len(asked), JOB)
    for column, values in texts.items():
        jobs[column] = indices(values, names[column])
    for column in ("rows", "size", "expected", "priority"):
        jobs[column] = [getattr(one.terms, column) for one in asked]
    jobs["arrival"] = begin + SLICE * (np.arange(len(asked)) + 0.5) / max(len(asked), 1)
    jobs["deadline"] = [math.nan if one.deadline is None else one.deadline for one in asked]
    jobs["state"], jobs["output"], jobs["seconds"], jobs["ran"] = REFUSED, -1, math.nan, math.nan
    return Arrivals(names, jobs)


def indices(values: Sequence[str], names: Sequence[str]) -> list[int]:
    """The number of each value in the table of names."""
    numbers = {name: n for n, name in enumerate(names)}
    return [numbers[value] for value in values]


def joined(parts: Sequence[Arrivals]) -> Arrivals:
    """All jobs of several parts, in order of arrival."""
    jobs = np.concatenate([np.empty(0, JOB), *(part.jobs for part in parts)])
    names = {}
    for column in NAMED:
        tables = [part.names[column] for part in parts]
        names[column] = tuple(dict.fromkeys(name for table in tables for name in table))
        numbers = [
            np.array(indices(table, names[column]), int)[part.jobs[column]]
            for table, part in zip(tables, parts, strict=True)
        ]
        jobs[column] = np.concatenate([np.empty(0, int), *numbers])
    unseen = tuple(sorted(span for part in parts for span in part.unseen))
    return Arrivals(names, jobs[np.argsort(jobs["arrival"], kind="stable")], unseen)


def pack(begin: int, arrivals: Arrivals) -> bytes:
    """A slice as stored: its columns one after the other, deflated; nothing if it has no jobs."""
    if not len(arrivals):
        return b""
    columns = {column: arrivals.jobs[column].tobytes() for column in JOB.fields or ()}
    columns["arrival"] = np.rint((arrivals.jobs["arrival"] - begin) * 1e6).astype(_STORED).tobytes()
    return zlib.compress(msgspec.msgpack.encode((arrivals.names, columns)), 1)


_unpack = msgspec.msgpack.Decoder(tuple[dict[str, tuple[str, ...]], dict[str, bytes]]).decode


def unpack(begin: int, packed: bytes) -> Arrivals | None:
    """The jobs of a stored slice; None if it cannot be read."""
    if not packed:
        return joined(())
    try:
        names, columns = _unpack(zlib.decompress(packed))
        jobs = np.empty(len(columns["rows"]) // JOB["rows"].itemsize, JOB)
        for column, (kind, *_) in (JOB.fields or {}).items():
            jobs[column] = np.frombuffer(columns[column], _STORED if column == "arrival" else kind)
        jobs["arrival"] = begin + jobs["arrival"] / 1e6
        known = all(jobs[column].max(initial=0) < len(names[column]) for column in NAMED)
    except (zlib.error, msgspec.MsgspecError, KeyError, ValueError):
        return None
    return Arrivals(names, jobs) if known else None


def assembled(slices: Mapping[int, bytes], begin: float, end: float) -> Arrivals:
    """The jobs that were accepted from `begin` until before `end`, from the stored slices, which are named by begin."""
    found, unseen = [], list[tuple[float, float]]()
    for start in range(slice_of(begin), math.ceil(end), SLICE):
        one = unpack(start, slices[start]) if start in slices else None
        if one is not None:
            found.append(one)
        elif unseen and unseen[-1][1] == start:
            unseen[-1] = unseen[-1][0], min(start + SLICE, end)
        else:
            unseen.append((max(start, begin), min(start + SLICE, end)))
    every = joined(found)
    arrival = every.jobs["arrival"]
    return replace(every, jobs=every.jobs[(arrival >= begin) & (arrival < end)], unseen=tuple(unseen))


def slice_of(moment: float) -> int:
    """The begin of the slice that `moment` is in."""
    return int(moment // SLICE) * SLICE


def hour_of(begin: float) -> str:
    """The UTC hour of a moment, such as 2026-11-27T15; hours sort by time."""
    return datetime.fromtimestamp(begin, UTC).strftime("%Y-%m-%dT%H")


def fresh_slices(until: float | None, now: float, *, longest: float, most: int) -> list[int]:
    """The slices to observe for the first time, earliest first: those after `until` that are over, up to `most`.

    Without an `until`, the history begins now. What is older than `longest` seconds is not caught up.
    """
    begin = slice_of(now) if until is None else max(slice_of(until), slice_of(now - longest))
    return [*range(begin, math.floor(now - SETTLE) - SLICE + 1, SLICE)][:most]


def again_at(begin: int, arrivals: Arrivals, now: float) -> float | None:
    """When to observe a slice again; None if all its jobs have ended, or it is too old."""
    return next((begin + age for age in OBSERVED_AGES if begin + age > now), None) if arrivals.open else None


def latencies(begin: int, arrivals: Arrivals) -> tuple[ServiceLatency, ...]:
    """How long the jobs of a slice took, by service."""
    names, jobs = arrivals.names["service"] if len(arrivals) else (), arrivals.jobs
    return tuple(_latency(begin, name, jobs[jobs["service"] == n]) for n, name in enumerate(names))


def _latency(begin: int, service: str, jobs: Jobs) -> ServiceLatency:
    answered = jobs["seconds"][jobs["state"] == ENDED]
    late = (jobs["state"] == _EXPIRED) | ((jobs["state"] == ENDED) & (jobs["seconds"] > jobs["deadline"]))
    return ServiceLatency(
        begin=begin,
        service=service,
        jobs=len(jobs) - int((refused := jobs["state"] == REFUSED).sum()),
        refused=int(refused.sum()),
        late=int(late.sum()),
        median=_quantile(answered, 0.5),
        slowest=_quantile(answered, 0.95),
        deadline=_quantile(jobs["deadline"], 0.5),
    )


def _quantile(values: NDArray[Any], share: float) -> float | None:
    """Of the known values; four digits are more than a picture shows."""
    known = values[np.isfinite(values)]
    return float(f"{np.quantile(known, share):.4g}") if len(known) else None


def surplus_hours(sizes: Mapping[str, int], now: float, *, keep: float, most: int) -> list[str]:
    """The hours to delete: those over for longer than `keep` seconds, and the oldest while all exceed `most` bytes."""
    oldest, total, deleted = hour_of(now - keep), sum(sizes.values()), []
    for hour in sorted(sizes):
        if hour >= oldest and total <= most:
            break
        deleted.append(hour)
        total -= sizes[hour]
    return deleted
