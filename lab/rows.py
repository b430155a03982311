"""A trace of a few requests, written out, or of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simulator.traces import COLUMNS, UNSET, Column, Trace, predict, read_arrivals, synthetic_arrivals, trace_of
from tasks.history import JOB, Arrivals

_NAMED = ("model", "tenant")
_TYPES = {"arrival": "f8", "model": "i2", "size": "i4", "output": "i4", "deadline": "f8"}
_TYPES |= {"priority": "i1", "service": "i1", "tenant": "i4"}
_UNSET: Mapping[str, Any] = {"output": 0, "deadline": math.nan, "priority": UNSET, "service": UNSET, "tenant": ""}


def make_trace(rows: Sequence[Mapping[str, Any]]) -> Trace:
    """A trace of mappings of `Trace`'s columns, with names in place of numbers.

    `arrival`, `model` and `size` are required; what is None is unset.
    """
    given = [{**_UNSET, **{name: value for name, value in row.items() if value is not None}} for row in rows]
    names = {name: tuple(dict.fromkeys(row[name] for row in given)) for name in _NAMED}
    for row in given:
        row |= {name: names[name].index(row[name]) for name in _NAMED}
    given.sort(key=lambda row: row["arrival"])
    columns = {name: np.array([row[name] for row in given], kind) for name, kind in _TYPES.items()}
    columns["arrival"] -= columns["arrival"][0]
    group = columns["model"].astype(np.int64) * len(names["tenant"]) + columns["tenant"]
    predicted = predict(columns["output"], group)
    return Trace(models=names["model"], tenants=names["tenant"], predicted=predicted, **columns)


def joined(traces: Sequence[Trace]) -> Trace:
    """All requests of several traces that start together; tenants of different traces stay distinct only by name."""
    models = tuple(dict.fromkeys(name for trace in traces for name in trace.models))
    tenants = tuple(dict.fromkeys(name for trace in traces for name in trace.tenants))
    columns = {name: np.concatenate([getattr(trace, name) for trace in traces]) for name in COLUMNS}
    columns["model"] = _renumbered([(trace.model, trace.models) for trace in traces], models)
    columns["tenant"] = _renumbered([(trace.tenant, trace.tenants) for trace in traces], tenants)
    order = np.argsort(columns["arrival"], kind="stable")
    return Trace(models=models, tenants=tenants, **{name: column[order] for name, column in columns.items()})


def _renumbered(parts: Sequence[tuple[Column, tuple[str, ...]]], names: tuple[str, ...]) -> Column:
    numbers = [np.array([names.index(name) for name in own], column.dtype)[column] for column, own in parts]
    return np.concatenate(numbers)


def synthetic_trace(spec: str, *, model: str) -> Trace:
    """The trace that a text describes, as `synthetic_arrivals` draws it."""
    return trace_of(synthetic_arrivals(spec, model=model))


def arrivals_of(trace: Trace, service: str = "") -> Arrivals:
    """A trace's requests as arrivals at a fleet, all of one service; without a name, of the fleet's default."""
    jobs = np.zeros(len(trace), JOB)
    for name in ("arrival", "model", "tenant", "size", "output", "deadline", "priority"):
        jobs[name] = getattr(trace, name)
    jobs["rows"], jobs["expected"], jobs["seconds"], jobs["ran"] = 1, trace.predicted, math.nan, math.nan
    names = {"model": trace.models, "tenant": trace.tenants, "service": (service,)}
    return Arrivals({**names, "locality": ("",), "hardware_class": ("",)}, jobs)


def read_trace(path: Path, *, model: str) -> Trace:
    """The requests of a CSV file, as `read_arrivals` reads it."""
    return trace_of(read_arrivals(path, model=model))
