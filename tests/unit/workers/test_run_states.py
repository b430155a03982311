"""Reports of what runs, and what counts as an outage of a server."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery.exceptions import BackendStoreError, NotRegistered
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kombu.exceptions import EncodeError, OperationalError, SerializerNotInstalled
from redis.exceptions import ResponseError, TimeoutError

from taxiway import Run
from taxiway.errors import BrokerUnavailableError
from taxiway.run import MOST_REPORTED
from workers.calling.callee import packed, run_parameter, unpacked
from workers.calling.channel import MOST_POSTED, Channel, FormError, shared_memory
from workers.celery_adapter.strategy import is_outage

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
DTYPES: Any = st.sampled_from([np.dtype("<f8"), np.dtype(">i4"), np.dtype("?")])
ARRAYS: Any = arrays.arrays(DTYPES, arrays.array_shapes(min_side=0))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


@given(st.binary() | ARRAYS | st.dictionaries(st.text(), PLAIN | ARRAYS | st.dictionaries(st.text(), PLAIN)))
def test_a_state_comes_back_as_it_was(state: Any) -> None:
    form, content = packed(state)
    assert same(state, unpacked(form, bytes(content)))


def test_a_generator_goes_on_where_it_was() -> None:
    random, other = np.random.default_rng(1), np.random.default_rng(2)
    random.normal(size=7)
    other.bit_generator.state = unpacked(*packed(random.bit_generator.state))
    assert np.array_equal(random.normal(size=9), other.normal(size=9))


def test_a_file_comes_back_as_another_file_of_the_same_content(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"content")
    back = unpacked(*packed(tmp_path / "state"))
    assert back != tmp_path / "state" and back.read_bytes() == b"content"
    back.unlink()


@pytest.mark.parametrize("state", [object(), {"a": object()}, 3, "text", np.zeros(2, object), {1j: 2}])
def test_a_state_that_no_form_fits_is_refused(state: Any) -> None:
    if isinstance(state, np.ndarray):
        state[0] = object()
    with pytest.raises(TypeError, match="checkpoint: "):
        packed(state)


@given(st.sampled_from(["bytes", "packed", "array [1]", 'array ["<f8",[3]]', "of the future"]), st.binary())
def test_bytes_of_another_form_are_an_error_of_form(form: str, content: bytes) -> None:
    try:
        unpacked(form, content)
    except FormError:
        return
    assert form in ("bytes", "packed") or len(content) >= 24


@pytest.mark.parametrize(
    ("fraction", "partial", "error"),
    [(1.1, None, ValueError), (-0.1, None, ValueError), (float("nan"), None, ValueError), (0.5, object(), TypeError)],
)
def test_a_report_that_says_nothing_is_refused(fraction: float, partial: Any, error: type[Exception]) -> None:
    with pytest.raises((error, AttributeError)):
        Run().report(fraction, "", partial)


def test_a_report_over_its_limit_is_refused_and_one_with_small_arrays_is_not() -> None:
    run = Run()
    run.report(0.5, "half", {"mean": np.arange(3), "at": np.float64(0.25)})
    assert run.reported == b'[0.5,"half",{"mean":[0,1,2],"at":0.25}]'
    with pytest.raises(ValueError, match=f"at most {MOST_REPORTED} bytes"):
        run.report(0.5, "x" * MOST_REPORTED)
    assert MOST_REPORTED <= MOST_POSTED


def test_a_run_without_a_fleet_keeps_its_state() -> None:
    run = Run(restored=b"before")
    assert (run.restored, run.should_yield) == (b"before", False)
    assert run.checkpoint(b"after")
    assert run.restored == b"after"


def test_a_run_is_given_to_the_parameter_that_is_annotated_so_whatever_its_name() -> None:
    def annotated(steps: int, of: Run) -> dict[str, Any]:
        return {}

    def named(run: int) -> dict[str, Any]:
        return {}

    assert [run_parameter(call) for call in (annotated, named)] == ["of", None]


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    memory = shared_memory()
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    both = [Channel(end, os.dup(memory)) for end in pair]
    os.close(memory)
    yield both[0], both[1]
    for end in both:
        end.close()


def test_the_latest_post_is_read_once_beside_what_takes_turns(ends: tuple[Channel, Channel]) -> None:
    worker, callee = ends
    assert worker.posted() == b""
    callee.post(b"first")
    callee.post(b"second")
    callee.send(np.arange(100_000))
    assert np.array_equal(worker.receive(), np.arange(100_000))
    assert [worker.posted(), worker.posted()] == [b"second", b""]
    worker.yield_asked = True
    callee.post(b"x" * MOST_POSTED)
    assert callee.yield_asked
    assert worker.posted() == b"x" * MOST_POSTED


def test_a_post_that_is_half_written_is_left_for_the_next_look(ends: tuple[Channel, Channel]) -> None:
    worker, callee = ends
    callee.post(b"whole")
    content = callee._map[64:69]
    callee._map[64:69] = b"ha" + content[2:]
    assert worker.posted() == b""
    callee._map[64:69] = content
    assert worker.posted() == b"whole"


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (BackendStoreError("failed to store result on the backend"), True),
        (BrokerUnavailableError("the state store does not answer"), True),
        (ConnectionResetError(), True),
        (OperationalError("connection refused"), True),
        (ResponseError("OOM command not allowed when used memory > 'maxmemory'"), True),
        (TimeoutError(), True),
        (EncodeError("an object is not JSON"), False),
        (NotRegistered("lab.failed"), False),
        (SerializerNotInstalled("No encoder installed for klingon"), False),
        (TypeError("'<' not supported between instances of 'str' and 'int'"), False),
        (struct.error("required argument is not an integer"), False),
    ],
)
def test_what_a_server_may_answer_otherwise_later_is_an_outage(error: Exception, outage: bool) -> None:
    assert is_outage(error) == outage
