"""The history's columns: what is read from records, stored, trimmed and read back."""

import math
import zlib
from typing import Any

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.decide.basis import basis_text, unserved_terms
from router.decide.classify import Constraints, Needs
from tasks import history
from taxiway.contract.job import JobState

BEGIN = 1_764_256_500  # the begin of a slice
NAMES = st.lists(st.text(max_size=8), min_size=1, max_size=4, unique=True).map(tuple)
SECONDS = st.one_of(st.just(math.nan), st.floats(0, 1e5, width=32))
FIELDS = tuple(history.JOB.fields or ())
NOWHERE = np.zeros((0, 4))


@st.composite
def slices(draw: st.DrawFn, begin: int = BEGIN, most: int = 12) -> history.Arrivals:
    names = {column: draw(NAMES) for column in history.NAMED}
    jobs = np.zeros(draw(st.integers(0, most)), history.JOB)
    for job in jobs:
        job["arrival"] = begin + draw(st.integers(0, history.SLICE * 1_000_000 - 1)) / 1e6
        for column in history.NAMED:
            job[column] = draw(st.integers(0, len(names[column]) - 1))
        for column in ("rows", "size", "expected"):
            job[column] = draw(st.integers(0, 2**32 - 1))
        job["output"], job["priority"] = draw(st.integers(-1, 2**31 - 1)), draw(st.integers(-1, 2))
        job["state"] = draw(st.integers(0, len(history.STATES) - 1))
        job["deadline"], job["seconds"], job["ran"] = draw(SECONDS), draw(SECONDS), draw(SECONDS)
    return history.Arrivals(names, jobs[np.argsort(jobs["arrival"], kind="stable")])


def rows(arrivals: history.Arrivals) -> list[tuple[str, ...]]:
    """Every job, with names instead of their numbers."""
    stated = [
        tuple(
            arrivals.names[column][job[column]] if column in history.NAMED else repr(job[column].item())
            for column in FIELDS
        )
        for job in arrivals.jobs
    ]
    return sorted(stated)


@given(slices())
def test_a_slice_is_read_back_as_it_was_stored(arrivals: history.Arrivals) -> None:
    read = history.unpack(BEGIN, history.pack(BEGIN, arrivals))
    assert read is not None
    assert np.abs(read.jobs["arrival"] - arrivals.jobs["arrival"]).max(initial=0) <= 1e-6
    read.jobs["arrival"] = arrivals.jobs["arrival"]
    assert rows(read) == rows(arrivals)


def test_a_late_answer_and_an_expired_job_missed_their_deadline_and_a_refused_one_counts_by_itself() -> None:
    expired, running = map(history.STATES.index, ("expired", "running"))
    states = [history.ENDED, history.ENDED, expired, history.REFUSED, running]
    jobs = np.zeros(5, history.JOB)
    jobs["state"], jobs["deadline"], jobs["seconds"] = states, 2.0, (1.0, 3.0, 2.0, 0.1, math.nan)
    names = dict.fromkeys(history.NAMED, ("live",))
    (live,) = history.latencies(BEGIN, history.Arrivals(names, jobs))
    assert (live.jobs, live.late, live.refused, live.median, live.slowest, live.deadline) == (4, 2, 1, 2.0, 2.9, 2.0)


@given(st.binary(max_size=60), slices(), st.data())
def test_bytes_that_are_no_slice_are_none(other: bytes, arrivals: history.Arrivals, data: st.DataObject) -> None:
    packed = history.pack(BEGIN, arrivals)
    cut = packed[: data.draw(st.integers(1, len(packed)))] if packed else b"\0"
    for raw in (b"\0" + other, cut if cut != packed else b"\0"):
        assert history.unpack(BEGIN, raw) is None
    columns = {column: arrivals.jobs[column].tobytes() for column in FIELDS if column != "ran"}
    assert history.unpack(BEGIN, zlib.compress(msgspec.msgpack.encode((arrivals.names, columns)))) is None


@given(
    stored=st.dictionaries(st.integers(0, 9), st.integers(0, 5), max_size=8),
    span=st.tuples(st.floats(0, 9.9), st.floats(0, 9.9)),
)
def test_what_was_not_observed_and_only_that_is_unseen(stored: dict[int, int], span: tuple[float, float]) -> None:
    begin, end = (BEGIN + one * history.SLICE for one in sorted(span))
    named = {BEGIN + n * history.SLICE: a_slice(BEGIN + n * history.SLICE, count) for n, count in stored.items()}
    read = history.assembled({at: history.pack(at, part) for at, part in named.items()}, begin, end)
    assert len(read) == sum(begin <= at < end for part in named.values() for at in part.jobs["arrival"])
    for moment in np.linspace(begin, end, 41)[:-1]:
        if moment == end:  # a span of less than a float's resolution
            break
        seen = not any(start <= moment < stop for start, stop in read.unseen)
        assert seen == (history.slice_of(moment) in named)
    assert all(later[0] > earlier[1] for earlier, later in zip(read.unseen, read.unseen[1:], strict=False))


def a_slice(begin: int, count: int) -> history.Arrivals:
    jobs = np.zeros(count, history.JOB)
    jobs["arrival"] = begin + np.arange(count) * history.SLICE / 8
    return history.Arrivals(dict.fromkeys(history.NAMED, ("x",)), jobs)


def basis(**fields: Any) -> str:
    needs = Needs(**({"deadline": 5.0, "level": 1, "rows": 2, "size": 12} | fields))
    return basis_text(needs, "s.1", (), NOWHERE)


@given(st.lists(st.tuples(st.floats(0.01, 1e5), st.integers(1, 9), st.integers(1, 40)), unique_by=lambda one: one[:2]))
def test_refused_requests_are_arrivals_of_their_slice_with_their_terms(asked: list[tuple[float, int, int]]) -> None:
    counts = {}
    for deadline, rows, times in asked:
        needs = Needs(deadline, 0, rows, 150, output=100, constraints=Constraints("live", "eu"))
        counts[history.unserved_text(unserved_terms("chat:1", "acme", needs))] = times
    read = history.unpack(BEGIN, history.pack(BEGIN, history.unserved(BEGIN, counts)))
    assert read is not None
    assert sorted(zip(read.jobs["deadline"], read.jobs["rows"], strict=True)) == sorted(
        (np.float32(deadline), rows) for deadline, rows, times in asked for _ in range(times)
    )
    assert {history.slice_of(at) for at in read.jobs["arrival"]} <= {BEGIN}
    assert {history.STATES[state] for state in read.jobs["state"]} <= {"refused"}
    if asked:
        found = [read.names[column] for column in ("model", "tenant", "service", "locality")]
        assert found == [("chat:1",), ("acme",), ("live",), ("eu",)]
        assert (read.jobs["size"] == 50).all()


def test_states_are_numbered_as_the_script_numbers_them() -> None:
    assert history.STATES[:-1] == (*JobState,)
    assert history.ENDED < history.REFUSED == len(history.STATES) - 1


@given(
    until=st.one_of(st.none(), st.floats(BEGIN - 1e5, BEGIN + 1e5)),
    now=st.floats(BEGIN, BEGIN + 1e5),
    most=st.integers(1, 50),
)
def test_settled_slices_are_observed_in_order_and_once(until: float | None, now: float, most: int) -> None:
    fresh = history.fresh_slices(until, now, longest=3600, most=most)
    assert fresh == sorted(set(fresh))
    assert len(fresh) <= most
    assert all(begin % history.SLICE == 0 and begin + history.SLICE + history.SETTLE <= now for begin in fresh)
    if fresh and until is not None:
        assert fresh[0] == max(history.slice_of(until), history.slice_of(now - 3600))
        assert history.fresh_slices(fresh[-1] + history.SLICE, now, longest=3600, most=most)[:1] != fresh[-1:]


def test_a_slice_is_observed_again_ever_later_while_a_job_of_it_has_not_ended() -> None:
    some = a_slice(BEGIN, 2)
    times, now = [], BEGIN + 40.0
    while (at := history.again_at(BEGIN, some, now)) is not None:
        times.append(at - BEGIN)
        now = at
    assert tuple(times) == history.OBSERVED_AGES
    some.jobs["state"] = history.ENDED
    assert history.again_at(BEGIN, some, BEGIN + 40.0) is None


@given(st.dictionaries(st.integers(0, 400), st.integers(0, 1000), max_size=30), st.integers(0, 5000))
def test_the_oldest_hours_are_deleted_until_the_rest_is_within_both_limits(sizes: dict[int, int], most: int) -> None:
    now = BEGIN + 400 * 3600
    hours = {history.hour_of(BEGIN + n * 3600): size for n, size in sizes.items()}
    deleted = history.surplus_hours(hours, now, keep=300 * 3600, most=most)
    left = {hour: size for hour, size in hours.items() if hour not in deleted}
    assert deleted == sorted(hours)[: len(deleted)]
    assert sum(left.values()) <= most
    assert all(hour >= history.hour_of(now - 300 * 3600) for hour in left)
    if deleted:
        kept_one_more = sum(left.values()) + hours[deleted[-1]] > most
        assert kept_one_more or deleted[-1] < history.hour_of(now - 300 * 3600)
