"""Requests with their arrival times, as columns.

Traces are read from files, made of the fleet's own history, or drawn with a seed from a text such as
`poisson:rate=50,duration=600,seed=1`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TextIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from simulator.fleet import SERVICES
from tasks.document import located
from tasks.history import JOB, NAMED, PRIORITIES, Arrivals, Jobs, indices
from taxiway.contract.request import Priority
from taxiway.errors import flaw, quoted

LARGEST = 999_999_999
"""The largest size and output of a trace."""

Count = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]


class AzureRow(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    rename={"arrival": "TIMESTAMP", "size": "ContextTokens", "output": "GeneratedTokens"},
):
    """A request of an Azure LLM trace."""

    arrival: datetime
    size: Count
    output: Count


class TraceRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of a generic trace; the columns with a default may follow in any order, or be left out."""

    arrival: Annotated[float, msgspec.Meta(ge=0, lt=1e12, description="seconds")]
    model: str
    size: Count
    deadline: Annotated[float, msgspec.Meta(gt=0, lt=1e12, description="seconds")] | None
    priority: Priority | None
    tenant: str | None
    output: Count | None = None
    service: str | None = None
    locality: str | None = None


UNSET = -1
"""In the columns `priority` and `service`: not given in the trace."""

QUANTILE = 0.75
"""Quantile of earlier outputs used to predict a new one: safe enough for deadlines, without assuming the worst."""

PRIOR = 256
"""Tokens predicted before any output of a model and tenant was seen."""

SHIFT = 30.0
"""Seconds by which a copied request is moved earlier or later: less than the lulls in the Azure traces."""

_RELEARN, _MEMORY = 128, 2048

Column = NDArray[Any]


class TraceError(ValueError):
    """A trace is invalid: where, what was expected and what was found. `line` counts from 1; 0 means all of it."""

    def __init__(self, source: str, line: int, expected: str, got: object, *, column: str = "") -> None:
        place = ": ".join(filter(None, (source, f"line {line}" if line else "", column)))
        super().__init__(f"{place}: expected {expected}, got {got}")


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival; each column has shape (n,)."""

    models: tuple[str, ...]
    tenants: tuple[str, ...]
    # Columns
    arrival: Column
    """Seconds from the first request."""
    model: Column
    """Index into `models`."""
    size: Column
    """What is known of a request: prompt tokens, rows."""
    output: Column
    """What it generates."""
    predicted: Column
    """What it was expected to generate."""
    deadline: Column
    """Seconds, NaN if unset."""
    priority: Column
    service: Column
    tenant: Column
    """Index into `tenants`."""

    def __len__(self) -> int:
        return len(self.arrival)

    def at_load(self, load: float, *, seed: int) -> Trace:
        """About `load` times as many requests at the same times; bursts and lulls are preserved.

        Each request occurs `load` times on average; copies are moved by up to `SHIFT` seconds.
        """
        if load == 1:
            return self
        random = np.random.default_rng(seed)
        times = int(load) + (random.random(len(self)) < load - int(load))
        kept = np.repeat(np.arange(len(self)), times)
        if len(kept) == 0:
            raise TraceError("trace", 0, "a load that leaves at least one request", f"{load:g}")
        copy = np.flatnonzero(kept == np.roll(kept, 1))
        arrival = self.arrival[kept]
        arrival[copy] += random.uniform(-SHIFT, SHIFT, len(copy))
        order = np.argsort(arrival, kind="stable")
        arrival = arrival[order] - arrival.min()
        columns = {name: getattr(self, name)[kept][order] for name in COLUMNS if name != "arrival"}
        return replace(self, arrival=arrival, **columns)

    def part(self, rows: slice | Column) -> Trace:
        """Some of the requests: a slice, or their numbers in ascending order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS})


COLUMNS = ("arrival", "model", "size", "output", "predicted", "deadline", "priority", "service", "tenant")
"""The fields of `Trace` with one value per request."""


def read_arrivals(path: Path, *, model: str) -> Arrivals:
    """The requests of a CSV file as arrivals: of the generic format, or of Azure's, whose requests ask for `model`.

    Raises:
        TraceError: the file cannot be read, or a row is invalid.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = sorted((_generic(row, path, model) for row in _parsed(lines, path)), key=lambda row: row.arrival)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(str(path), 0, "a readable CSV file in UTF-8", flaw(error)) from error
    jobs, names = _jobs([row.arrival - rows[0].arrival for row in rows]), dict(_NO_NAMES)
    for column in ("model", "tenant", "service", "locality"):
        texts = [getattr(row, column) or "" for row in rows]
        names[column] = tuple(dict.fromkeys(texts))
        jobs[column] = indices(texts, names[column])
    jobs["size"], jobs["output"] = [row.size for row in rows], [row.output or 0 for row in rows]
    jobs["deadline"] = [math.nan if row.deadline is None else row.deadline for row in rows]
    jobs["priority"] = [UNSET if row.priority is None else PRIORITIES.index(row.priority) for row in rows]
    jobs["expected"] = predict(jobs["output"], jobs["model"].astype(np.int64) * len(rows) + jobs["tenant"])
    return Arrivals(names, jobs)


_NO_NAMES: Mapping[str, tuple[str, ...]] = dict.fromkeys(NAMED, ("",))


def _jobs(arrival: Sequence[float] | Times) -> Jobs:
    """Jobs of a row each that came then, and did not run."""
    jobs = np.zeros(len(arrival), JOB)
    jobs["arrival"], jobs["rows"], jobs["seconds"], jobs["ran"] = arrival, 1, math.nan, math.nan
    return jobs


def _parsed(lines: Iterable[str], path: Path) -> Iterator[Any]:
    """The rows in these lines, of which the first is the header: as the first kind that fits it."""
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    records, row = filter(None, reader), None  # without blank lines
    try:
        header = next(records, [])
        kind: Any = next((kind for kind in (AzureRow, TraceRow) if _fits(header, kind)), None)
        if kind is None:
            expected = f"the columns {columns_of(AzureRow)} or {columns_of(TraceRow)}"
            raise TraceError(str(path), 1, expected, ",".join(header) or "nothing")
        for record in records:
            if len(record) != len(header):
                raise TraceError(str(path), reader.line_num, f"{len(header)} fields", len(record))
            cells = {name: cell or None for name, cell in zip(header, record, strict=True)}
            row = msgspec.convert(cells, kind, strict=False)
            yield row
    except csv.Error as error:
        raise TraceError(str(path), reader.line_num, "CSV", error) from error
    except msgspec.ValidationError as error:
        column, expected, value = located(cells, kind, str(error))
        got = "nothing" if value is None else quoted(value)
        raise TraceError(str(path), reader.line_num, expected, got, column=".".join(column)) from error
    if row is None:
        raise TraceError(str(path), 0, "at least one row", "none")


def columns_of(kind: type[msgspec.Struct]) -> str:
    """The header that a file of such rows has."""
    needed, optional = _columns(kind)
    return ",".join(needed) + (f" (and {', '.join(optional)})" if optional else "")


def _fits(header: Sequence[str], kind: type[msgspec.Struct]) -> bool:
    needed, optional = _columns(kind)
    return set(needed) <= set(header) <= {*needed, *optional} and len(set(header)) == len(header)


def _columns(kind: type[msgspec.Struct]) -> tuple[list[str], list[str]]:
    """The columns that a file must have, and those that it may have."""
    fields = msgspec.structs.fields(kind)
    return [one.encode_name for one in fields if one.required], [one.encode_name for one in fields if not one.required]


def _generic(row: AzureRow | TraceRow, path: Path, model: str) -> TraceRow:
    if isinstance(row, TraceRow):
        return row
    if not model:
        raise TraceError(str(path), 1, "a trace that names its models, or the option --model", "none")
    arrival = (row.arrival.replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds()
    return TraceRow(arrival, model, row.size, None, None, None, row.output)


def predict(output: Column, group: Column) -> Column:
    """Each request's expected output: a quantile of earlier ones of its group (model and tenant).

    Shapes: (n,), (n,) to (n,), int32. Learned again every 128 requests from the preceding 2,048; no request sees its
    own.
    """
    predicted = np.zeros(len(output), np.int32)
    for name in np.unique(group):
        members = np.flatnonzero(group == name)
        outputs = output[members]
        for start in range(0, len(members), _RELEARN):
            seen = outputs[max(0, start - _MEMORY) : start]
            guess = np.quantile(seen, QUANTILE) if len(seen) else PRIOR * (outputs.max() > 0)
            predicted[members[start : start + _RELEARN]] = round(float(guess))
    return predicted


Random = np.random.Generator
Times = NDArray[np.float64]

_COMMON: Mapping[str, float] = {"duration": 600.0, "seed": 0.0, "size": 1000.0, "output": 150.0, "spread": 1.0}

_MOST_ARRIVALS = 20_000_000


def is_spec(text: str) -> bool:
    """Whether the text specifies a synthetic trace."""
    return text.partition(":")[0] in KINDS


def synthetic_arrivals(spec: str, *, model: str, service: str = "") -> Arrivals:
    """The arrivals that `spec` describes: a kind, then its figures. Without a `service` they have the fleet's default.

    Every kind has `duration` (seconds), `seed`, and the mean `size` and `output` of requests, which are log-normal with
    the standard deviation `spread` of their logarithm; 0 makes them all equal.

    Raises:
        TraceError: unknown kind or figure, or a figure out of range.
    """
    kind, _, text = spec.partition(":")
    if kind not in KINDS:
        raise TraceError(spec, 0, f"a kind of trace, one of {', '.join(sorted(KINDS))}", repr(kind))
    make, own = KINDS[kind]
    figures = _figures(spec, text, {**_COMMON, **own})
    random = np.random.default_rng(int(figures["seed"]))
    arrival = make(figures, random)
    if len(arrival) == 0:
        raise TraceError(spec, 0, "a rate and a duration that give at least one request", "none")
    return Arrivals({**_NO_NAMES, "model": (model,), "service": (service,)}, _drawn(arrival, figures, random))


def _figures(spec: str, text: str, defaults: Mapping[str, float]) -> dict[str, float]:
    figures = dict(defaults)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise TraceError(spec, 0, f"one of {', '.join(sorted(defaults))}", repr(name))
        try:
            figures[name] = float(value)
        except ValueError:
            raise TraceError(spec, 0, f"{name} as a number", repr(value)) from None
        if not 0 <= figures[name] < 1e9:
            raise TraceError(spec, 0, f"{name} from 0 to 1e9", repr(value))
    rate = max((figures[name] for name in ("rate", "high", "low", "peak") if name in figures), default=0.0)
    if rate * figures["duration"] > _MOST_ARRIVALS:
        raise TraceError(spec, 0, f"at most {_MOST_ARRIVALS} requests", f"{rate * figures['duration']:.0f}")
    return figures


def _drawn(arrival: Times, figures: Mapping[str, float], random: Random) -> Jobs:
    jobs = _jobs(arrival - arrival[0])
    jobs["size"] = _sizes(figures["size"], figures["spread"], len(arrival), random)
    jobs["output"] = _sizes(figures["output"], figures["spread"], len(arrival), random)
    jobs["expected"] = predict(jobs["output"], np.zeros(len(arrival), np.int64))
    jobs["deadline"], jobs["priority"] = math.nan, UNSET
    return jobs


def _sizes(mean: float, spread: float, count: int, random: Random) -> NDArray[np.int32]:
    """Integers from 1 with the given mean, log-normal; all 0 if the mean is 0."""
    drawn = mean * np.exp(spread * random.standard_normal(count) - spread**2 / 2)
    return np.rint(np.maximum(drawn, min(mean, 1.0))).astype(np.int32)


def _mmpp(figures: Mapping[str, float], random: Random) -> Times:
    """A Markov-modulated Poisson process of two rates, each kept for `stay` seconds on average (Fischer, 1993)."""
    now, fast, parts = 0.0, False, [np.empty(0)]
    while now < figures["duration"]:
        until = min(now + random.exponential(max(figures["stay"], 1e-3)), figures["duration"])
        parts.append(_uniform(figures["high" if fast else "low"], now, until, random))
        now, fast = until, not fast
    return np.concatenate(parts)


def _diurnal(figures: Mapping[str, float], random: Random) -> Times:
    """A rate with a daily pattern: `rate · (1 − swing · cos(2πt / period))`."""
    swing = min(figures["swing"], 1.0)
    times = _uniform(figures["rate"] * (1 + swing), 0.0, figures["duration"], random)
    share = (1 - swing * np.cos(2 * np.pi * times / max(figures["period"], 1e-3))) / (1 + swing)
    return times[random.random(len(times)) < share]


def _flash(figures: Mapping[str, float], random: Random) -> Times:
    """A constant rate, plus a burst at the rate `peak` from second `at` for `length` seconds."""
    begin = min(figures["at"], figures["duration"])
    end = min(begin + figures["length"], figures["duration"])
    surge = _uniform(figures["peak"], begin, end, random)
    return np.sort(np.concatenate([_uniform(figures["rate"], 0.0, figures["duration"], random), surge]))


def _uniform(rate: float, begin: float, end: float, random: Random) -> Times:
    """Poisson arrivals between two times: their number first, then their uniform positions."""
    return np.sort(random.uniform(begin, end, random.poisson(rate * (end - begin))))


KINDS: Mapping[str, tuple[Callable[[Mapping[str, float], Random], Times], Mapping[str, float]]] = {
    "poisson": (lambda figures, random: _uniform(figures["rate"], 0.0, figures["duration"], random), {"rate": 10.0}),
    "mmpp": (_mmpp, {"low": 5.0, "high": 50.0, "stay": 30.0}),
    "diurnal": (_diurnal, {"rate": 10.0, "swing": 0.8, "period": 3600.0}),
    "flash": (_flash, {"rate": 10.0, "peak": 100.0, "at": 120.0, "length": 60.0}),
}
"""Each kind's generator, and its own figures with their defaults."""


def trace_of(arrivals: Arrivals) -> Trace:
    """The trace that replays these arrivals, with those that were refused.

    A request of several rows has the size of all of them. `output` is what was generated, or what was expected while
    that is unknown. A service that the simulator does not know is unset; such requests have their deadlines.
    """
    jobs = arrivals.jobs
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
    bounded: Column = np.minimum(sizes, LARGEST).astype(np.int32)
    return bounded


def write_arrivals(arrivals: Arrivals, lines: TextIO) -> None:
    """Write arrivals as a generic CSV file, as `read_arrivals` reads it: `trace_of` by its columns.

    Models are named without their version, services and localities as the fleet has them.
    """
    trace, names, jobs = trace_of(arrivals), arrivals.names, arrivals.jobs
    columns = (
        [f"{arrival:.6f}" for arrival in trace.arrival.tolist()],
        [trace.models[number].partition(":")[0] for number in trace.model.tolist()],
        trace.size.tolist(),
        ["" if math.isnan(deadline) else f"{deadline:.7g}" for deadline in trace.deadline.tolist()],
        ["" if number == UNSET else PRIORITIES[number] for number in trace.priority.tolist()],
        [trace.tenants[number] for number in trace.tenant.tolist()],
        trace.output.tolist(),
        *([names[column][number] for number in jobs[column].tolist()] for column in ("service", "locality")),
    )
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(TraceRow.__struct_fields__)
    writer.writerows(zip(*columns, strict=True))
