"""A callable in a process of its own: what comes back, what ends it, and that nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tasks.models.files import Code
from taxiway.errors import InvalidRequestError
from tests.waiting import gone, until
from workers.calling.channel import (
    INLINE,
    SHARED_BYTES_KEPT,
    CallError,
    Channel,
    FormError,
    NotWantedError,
    OutOfMemoryError,
    ProcessLostError,
    shared_memory,
)
from workers.calling.child import Child, FollowedRun

DEEDS = Code("tests.callables.deeds:call")
LIMIT = 256 * 2**20
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which callables note which processes they are."""
    monkeypatch.setenv("TAXIWAY_NOTED", str(tmp_path / "notes"))
    return tmp_path / "notes"


def started() -> Child:
    child = Child(DEEDS, memory=LIMIT)
    child.await_ready()
    return child


@pytest.fixture(scope="module")
def lasting() -> Iterator[Child]:
    """A process that no test ends."""
    child = started()
    yield child
    assert child.alive
    child.end()


@pytest.fixture
def child(notes: Path) -> Iterator[Child]:
    child = started()
    yield child
    child.end()


def ask(child: Child, deed: str, number: int = 1, look: Callable[[], None] = lambda: None) -> Any:
    return child.call({"deed": element(deed), "number": np.asarray(number)}, look)["given"]


def element(value: Any) -> np.ndarray:
    """An object array without axes, as a row has them."""
    array = np.empty((), object)
    array[()] = value
    return array


def pids(notes: Path, count: int) -> list[int]:
    """The processes that noted themselves, once there are so many."""
    assert until(lambda: notes.exists() and len(notes.read_text().splitlines()) >= count)
    return [int(line) for line in notes.read_text().splitlines()]


@pytest.fixture(scope="module")
def channels() -> Iterator[tuple[Channel, Channel]]:
    """Both ends."""
    memory = shared_memory()
    ends = [Channel(end, os.dup(memory)) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    os.close(memory)
    yield ends[0], ends[1]
    for end in ends:
        end.close()


@given(VALUES)
def test_any_json_value_and_bytes_are_received_as_they_were_sent(channels: tuple[Channel, Channel], value: Any) -> None:
    channels[0].send({"value": value, "element": element(value)})
    received = channels[1].receive()
    assert received["value"] == received["element"][()] == value


@given(arrays.arrays(arrays.scalar_dtypes(), arrays.array_shapes(min_dims=0, min_side=0)))
def test_any_array_of_numbers_or_times_is_received_as_it_was_sent(
    channels: tuple[Channel, Channel], array: np.ndarray
) -> None:
    channels[0].send(array)
    received = channels[1].receive()
    assert (received.dtype, received.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(received, array)


@pytest.mark.parametrize("size", [0, 1, INLINE, SHARED_BYTES_KEPT, 8 * SHARED_BYTES_KEPT])
def test_values_of_any_size_are_received_as_they_were_sent(channels: tuple[Channel, Channel], size: int) -> None:
    parts = {"a": np.arange(size, dtype=np.uint8), "b": np.arange(size // 8, dtype=float)}
    for sender, receiver in (channels, channels[::-1], channels):  # the last time in memory that was given back
        sender.send({"text": "x" * size, "bytes": b"x" * size, **parts})
        received = receiver.receive()
        assert (received["text"], received["bytes"]) == ("x" * size, b"x" * size)
        for name, part in parts.items():
            np.testing.assert_array_equal(received[name], part)
            received[name][:1] = 0  # its own, and no view of what the next message overwrites
        receiver.trim()


@pytest.mark.parametrize("message", [b"", b"x", b"h\xc1", b"s\x92\x00\xff", b"s\x92\xcd\x7f\xff\xcd\x7f\xff"])
def test_what_is_no_message_is_refused(channels: tuple[Channel, Channel], message: bytes) -> None:
    """Also an array that lies beyond the memory, or has no plain elements."""
    channels[0]._socket.send(message or b"h" + msgspec.msgpack.encode(msgspec.msgpack.Ext(7, b"")))
    with pytest.raises(FormError):
        channels[1].receive()


def test_a_callable_gets_plain_elements_and_gives_numbers_or_arrays(lasting: Child) -> None:
    assert ask(lasting, "echo", 7) == 7
    assert ask(lasting, "large", 10**6).sum() == 499999500000
    assert ask(lasting, "mapping")[()]["a"][:4] == [1, None, b"\xff", 0.5]
    assert ask(lasting, "ragged")[()] == [1, [2]]


@pytest.mark.cases("deed, text")
def test_whatever_a_callable_raises_or_gives_ends_the_call_alone(lasting: Child, deed: str, text: str) -> None:
    with pytest.raises(CallError) as raised:
        ask(lasting, deed)
    assert str(raised.value).startswith(text)
    assert ask(lasting, "echo", 2) == 2


def test_an_error_of_ours_comes_back_as_itself(lasting: Child) -> None:
    with pytest.raises(InvalidRequestError, match="not this number") as raised:
        ask(lasting, "refuse")
    assert raised.value.details == {"field": "inputs.number"}


def test_a_value_too_deep_to_send_is_an_error_and_no_crash(child: Child) -> None:
    assert ask(child, "nest", 20) is not None
    with pytest.raises(CallError, match="RecursionError"):
        ask(child, "nest", 100_000)


def test_a_callable_that_comes_back_from_a_fork_answers_once(child: Child) -> None:
    assert [ask(child, "fork", 5), ask(child, "echo", 6), ask(child, "echo", 7)] == [5, 6, 7]


def test_a_callable_sees_none_of_the_worker_s_secrets(monkeypatch: pytest.MonkeyPatch, notes: Path) -> None:
    for name in ("TAXIWAY_SECRET", "TAXIWAY_BROKER", "TAXIWAY_PRODUCER_SECRET"):
        monkeypatch.setenv(name, "known")
    child = started()
    assert ask(child, "secrets").tolist() == []
    child.end()


def test_what_a_callable_started_ends_with_it_though_it_ignores_sigterm(child: Child, notes: Path) -> None:
    def look() -> None:
        if notes.exists() and len(notes.read_text().splitlines()) == 2:
            raise NotWantedError

    with pytest.raises(NotWantedError):
        ask(child, "stubborn", 600, look)
    assert until(lambda: all(gone(pid) for pid in pids(notes, 2)))


@pytest.mark.cases("deed, number, text")
def test_a_call_that_crashes_or_holds_too_much_loses_its_process(
    child: Child, deed: str, number: int, text: str
) -> None:
    assert ask(child, "echo", 2) == 2
    with pytest.raises(ProcessLostError, match=text) as raised:
        ask(child, deed, number)
    assert not child.alive and gone(child.pid)
    if isinstance(raised.value, OutOfMemoryError):
        assert raised.value.calls == 1
    with pytest.raises(ProcessLostError, match="is gone"):
        ask(child, "echo")


def test_a_callable_that_cannot_be_imported_leaves_no_process() -> None:
    child = Child(Code("nowhere:call"))
    with pytest.raises(CallError, match="No module named"):
        child.await_ready()
    assert gone(child.pid)


def test_an_idle_process_whose_worker_is_gone_ends_and_so_does_what_it_started(tmp_path: Path) -> None:
    code = f"""
import os, signal, threading, time
import numpy as np
os.environ["TAXIWAY_NOTED"] = {str(tmp_path / "notes")!r}
from tasks.models.files import Code
from workers.calling.child import Child
idle, busy = (Child(Code("tests.callables.deeds:call")) for _ in range(2))
for one in (idle, busy):
    one.await_ready()
print(idle.pid, busy.pid, flush=True)
deed = np.empty((), object)
deed[()] = "stubborn"
busy.call({{"deed": deed, "number": np.asarray(600)}}, lambda: None)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        idle, busy = map(int, worker.stdout.readline().split())
        orphan, noted = pids(tmp_path / "notes", 2)
        assert noted == busy
        os.kill(worker.pid, signal.SIGKILL)
        assert until(lambda: all(map(gone, (idle, busy, orphan))))


def test_calls_use_no_file_in_dev_shm(child: Child) -> None:
    ask(child, "large", 10**6)
    for process in (os.getpid(), child.pid):
        assert "/dev/shm/" not in Path(f"/proc/{process}/maps").read_text()


class UnreadableRun(FollowedRun):
    """One whose reports cannot be read."""

    def look(self, report: bytes) -> None:
        """Read what is no report."""
        msgspec.json.decode(b"{")


def test_a_call_whose_report_cannot_be_read_is_lost_with_its_process_which_is_still_in_it(child: Child) -> None:
    with pytest.raises(ProcessLostError, match="cannot be read"):
        child.call({"deed": element("sleep"), "number": np.asarray(60)}, lambda: None, UnreadableRun())
    assert not child.alive
