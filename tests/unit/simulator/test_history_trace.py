"""The fleet's own arrivals as a trace, as a CSV file, and summed up."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.fleet import SERVICES
from simulator.own_fleet.history import shares_of
from simulator.traces import read_arrivals, read_trace, trace_of, write_arrivals
from tasks.history import JOB, NAMED, STATES, Arrivals

NAMES = {
    **dict.fromkeys(NAMED, ("x",)),
    "model": ("echo:1", 'odd, "name":2'),
    "tenant": ("", "a,b"),
    "service": (*SERVICES, "nightly"),
}
DEADLINES = st.one_of(st.just(math.nan), st.floats(0.5, 2**20, width=32))


@st.composite
def recorded(draw: st.DrawFn) -> Arrivals:
    jobs = np.zeros(draw(st.integers(1, 8)), JOB)
    jobs["arrival"] = sorted(draw(st.integers(0, 86_400_000_000)) / 1e6 for _ in jobs)
    for job in jobs:
        job["model"], job["tenant"], job["service"] = (draw(st.integers(0, n)) for n in (1, 1, 3))
        job["rows"], job["size"], job["expected"] = (draw(st.integers(1, n)) for n in (4, 10**9, 4000))
        job["output"], job["priority"] = draw(st.integers(-1, 4000)), draw(st.integers(-1, 2))
        job["deadline"], job["state"] = draw(DEADLINES), draw(st.integers(0, len(STATES) - 2))
    return Arrivals(NAMES, jobs)


@given(arrivals=recorded())
def test_an_exported_day_is_read_as_its_trace(tmp_path_factory: pytest.TempPathFactory, arrivals: Arrivals) -> None:
    trace, lines = trace_of(arrivals), io.StringIO()
    file = tmp_path_factory.getbasetemp() / "exported.csv"

    write_arrivals(arrivals, lines)
    file.write_text(lines.getvalue())
    read = read_trace(Path(file), model="unused")

    assert read.arrival == pytest.approx(trace.arrival, abs=2e-6)
    assert read.deadline == pytest.approx(trace.deadline, nan_ok=True)
    for column in ("size", "output", "priority", "service"):
        assert getattr(read, column).tolist() == getattr(trace, column).tolist()
    assert [read.models[n] for n in read.model] == [trace.models[n].partition(":")[0] for n in trace.model]
    assert [read.tenants[n] for n in read.tenant] == [trace.tenants[n] for n in trace.tenant]
    again = read_arrivals(file, model="unused")
    for column in ("model", "tenant", "service", "locality"):
        before, after = ([one.names[column][n] for n in one.jobs[column]] for one in (arrivals, again))
        assert after == [name.partition(":")[0] if column == "model" else name for name in before]
    assert trace_of(again).predicted.tolist() == read.predicted.tolist()


def some(**columns: Sequence[float]) -> Arrivals:
    jobs = np.zeros(len(next(iter(columns.values()))), JOB)
    jobs["rows"], jobs["size"], jobs["output"] = 1, 1, -1
    for column, values in columns.items():
        jobs[column] = values
    return Arrivals(NAMES, jobs)


def state(name: str) -> int:
    return STATES.index(name)


def test_jobs_are_summed_up_by_model_and_service() -> None:
    ends = ["succeeded", "succeeded", "succeeded", "expired", "cancelled", "queued", "refused", "failed"]
    arrivals = some(
        state=[state(end) for end in ends],
        seconds=[1, 3, 2, 5, 1, math.nan, 0, 1],
        deadline=[2, 2, math.nan, 5, 5, 5, 5, 5],
        model=[0] * 6 + [1, 1],
        service=[1] * 6 + [0, 0],
    )
    first, second = shares_of(arrivals)
    assert (first.model, first.service, first.jobs) == ("echo:1", "standard", 6)
    assert (first.open, first.answered, first.failed, first.cancelled, first.refused) == (1, 3, 1, 1, 0)
    assert (first.timely, first.p50) == (0.5, 2.0)
    assert (second.failed, second.refused, second.timely, second.p50) == (1, 1, 0.0, None)
