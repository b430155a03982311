"""Traces from files, from the fleet's own history and as drawn: figures of public ones, and what bad rows are told."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.rows import read_trace, synthetic_trace
from simulator.fleet import SERVICES
from simulator.own_fleet.history import shares_of
from simulator.traces import KINDS, PRIOR, TraceError, predict, read_arrivals, trace_of, write_arrivals
from tasks.history import JOB, NAMED, STATES, Arrivals
from tests.unit.simulator.public_data import table

HEADER = "arrival,model,size,deadline,priority,tenant"


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.cases("name, count, span, rate, dispersion, prompts, outputs")
def test_the_azure_reader_gives_the_published_figures(
    name: str, count: int, span: float, rate: float, dispersion: float, prompts: list[int], outputs: list[int]
) -> None:
    trace = read_trace(table(f"azure_llm_{name}.csv"), model="chat")
    minutes = np.bincount((trace.arrival // 60).astype(int))[: int(trace.arrival[-1] // 60)]
    assert len(trace) == count
    assert trace.arrival[-1] == pytest.approx(span, abs=0.05)
    assert minutes.mean() / 60 == pytest.approx(rate, abs=0.001)
    assert minutes.var() / minutes.mean() == pytest.approx(dispersion, rel=0.02)
    assert tuple(np.quantile(trace.size, [0.5, 0.9, 0.99, 1.0]).round()) == pytest.approx(prompts, abs=6)
    assert tuple(np.quantile(trace.output, [0.5, 0.9, 0.99, 1.0]).round()) == pytest.approx(outputs, abs=1)


@pytest.mark.cases("row, expected")
def test_a_bad_row_is_named_by_its_line_and_what_was_expected(tmp_path: Path, row: str, expected: str) -> None:
    path = written(tmp_path, f"{HEADER}\n0,chat,1,,,\n\n{row}\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path, model="chat")
    assert str(caught.value).startswith(f"{path}: line 4: ") and expected in str(caught.value)


@pytest.mark.parametrize("text", ["", "a,b,c\n1,2,3\n", f"{HEADER},colour\n", f"{HEADER},size\n", f"{HEADER}\n"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(TraceError):
        read_trace(written(tmp_path, text), model="chat")


def test_a_missing_or_binary_file_and_a_bad_time_in_an_azure_trace_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    with pytest.raises(TraceError, match="line 2: TIMESTAMP: expected RFC3339"):
        read_trace(path, model="chat")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(TraceError, match="readable CSV"):
            read_trace(tmp_path / name, model="chat")


@pytest.mark.parametrize("kind", KINDS)
def test_a_synthetic_trace_is_the_same_for_a_seed_and_another_for_another(kind: str) -> None:
    first, again, other = (synthetic_trace(f"{kind}:duration=300,seed={seed}", model="m") for seed in (1, 1, 2))
    assert np.array_equal(first.arrival, again.arrival)
    assert np.array_equal(first.output, again.output)
    assert not np.array_equal(first.arrival, other.arrival)
    assert (np.diff(first.arrival) >= 0).all()


@pytest.mark.cases("spec")
def test_a_bad_spec_is_refused(spec: str) -> None:
    with pytest.raises(TraceError):
        synthetic_trace(spec, model="m")


def test_a_load_multiplies_the_requests_and_keeps_the_span() -> None:
    trace = synthetic_trace("poisson:rate=20,duration=600", model="m")
    for load in (0.3, 2.5):
        scaled = trace.at_load(load, seed=1)
        assert len(scaled) == pytest.approx(load * len(trace), rel=0.05)
        assert scaled.arrival[-1] == pytest.approx(600, abs=61)
        assert (np.diff(scaled.arrival) >= 0).all()


def test_a_prediction_never_sees_its_own_output() -> None:
    output = np.full(400, 50, np.int32)
    changed = output.copy()
    changed[300] = 100_000
    before, after = predict(output, np.zeros(400)), predict(changed, np.zeros(400))
    assert np.array_equal(before[:301], after[:301])
    assert before[0] == PRIOR
    assert before[399] == 50


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
