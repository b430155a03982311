"""A client's loop is run by its caller while that alone waits, and by a background thread else."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from taxiway.client.sync_client import CONTENDED, HAND_BACK, LoopThread, _Interrupts
from tests.waiting import until


async def nothing() -> None:
    """What runs on the loop before it ends."""


async def here() -> int:
    """The thread that runs the loop."""
    return threading.get_ident()


async def after(event: asyncio.Event) -> int:
    await event.wait()
    return threading.get_ident()


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    opened = LoopThread(nothing)
    yield opened
    opened.close()


HAND_BACK_LATE = 120.0
"""Seconds within which the next call comes however busy the machine is."""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call comes soon."""
    monkeypatch.setattr("taxiway.client.sync_client.HAND_BACK", HAND_BACK_LATE)


def elsewhere(body: Callable[[], Any]) -> Any:
    """What a function returns on another thread, where no signal handler runs."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(body()))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0]


@pytest.mark.usefixtures("soon")
def test_a_thread_that_calls_again_soon_runs_the_loop(loop: LoopThread) -> None:
    def calls() -> list[bool]:
        return [loop.run(here()) == threading.get_ident() for _ in range(5)]

    assert elsewhere(calls) == [False, True, True, True, True]


def test_an_idle_loop_is_handed_back_and_runs_what_was_left_there(loop: LoopThread) -> None:
    ran = threading.Event()

    async def leave() -> None:
        asyncio.get_running_loop().call_later(HAND_BACK, ran.set)

    def calls() -> int:
        loop.run(here())
        loop.run(leave())
        assert ran.wait(60)
        return loop.run(here()) != threading.get_ident()

    assert elsewhere(calls)


def test_a_call_now_and_then_is_left_to_the_background_thread(loop: LoopThread) -> None:
    def calls() -> list[bool]:
        ran_here = []
        for _ in range(2):
            ran_here.append(loop.run(here()) == threading.get_ident())
            time.sleep(3 * HAND_BACK)
        return ran_here

    assert elsewhere(calls) == [False, False]


@pytest.mark.usefixtures("soon")
def test_what_was_started_runs_at_once_without_further_calls(loop: LoopThread) -> None:
    def calls() -> bool:
        loop.run(here())
        mine = loop.run(here())
        began = time.monotonic()
        started = loop.start(here()).result(60)
        return mine == threading.get_ident() != started and time.monotonic() - began < HAND_BACK_LATE

    assert elsewhere(calls)


@pytest.mark.usefixtures("soon")
def test_another_thread_is_answered_by_the_loop_that_one_runs_and_after_it(loop: LoopThread) -> None:
    events: dict[str, asyncio.Event] = {}
    answers: dict[str, int] = {}

    async def wait(name: str) -> int:
        events[name] = asyncio.Event()
        return await after(events[name])

    def ask(name: str) -> None:
        loop.run(here())
        answers[name] = loop.run(wait(name))

    async def let_go(name: str) -> None:
        events[name].set()

    first = threading.Thread(target=ask, args=["first"])
    first.start()
    assert until(lambda: loop._turns.driver == first.ident)
    second = threading.Thread(target=ask, args=["second"])
    second.start()
    assert until(lambda: "second" in events)
    assert loop.start(here()).result(60) == first.ident
    loop.start(let_go("first")).result(60)
    first.join(60)
    assert answers == {"first": first.ident}
    loop.start(let_go("second")).result(60)
    second.join(60)
    assert answers["second"] not in (first.ident, second.ident)


@pytest.mark.usefixtures("soon")
def test_threads_that_call_at_once_leave_the_loop_to_the_background_thread_for_a_while(loop: LoopThread) -> None:
    events: list[asyncio.Event] = []

    async def wait() -> int:
        events.append(asyncio.Event())
        return await after(events[0])

    async def let_go() -> None:
        events[0].set()

    driving = threading.Thread(target=lambda: (loop.run(here()), loop.run(wait())))
    driving.start()
    assert until(lambda: bool(events))
    began = time.monotonic()
    elsewhere(lambda: loop.run(let_go()))
    driving.join(60)
    ran_here = elsewhere(lambda: [loop.run(here()) == threading.get_ident() for _ in range(3)])
    assert time.monotonic() - began > CONTENDED or not any(ran_here)


def test_many_threads_are_all_answered(loop: LoopThread) -> None:
    async def soon(n: int) -> int:
        await asyncio.sleep(0.0001 * (n % 3))
        return n

    answers: dict[int, list[int]] = {}

    def ask(n: int) -> None:
        answers[n] = [loop.run(soon(n + m)) for m in range(100)]

    threads = [threading.Thread(target=ask, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {n: list(range(n, n + 100)) for n in range(8)}


def test_within_an_event_loop_the_background_thread_runs_the_call(loop: LoopThread) -> None:
    async def nested() -> list[bool]:
        return [loop.run(here()) == threading.get_ident() for _ in range(3)]

    assert elsewhere(lambda: asyncio.run(nested())) == [False, False, False]


@pytest.mark.usefixtures("soon")
def test_a_call_from_within_a_call_is_refused_instead_of_waiting_for_itself(loop: LoopThread) -> None:
    async def nested() -> None:
        loop.run(here())

    def calls() -> str:
        loop.run(here())
        with pytest.raises(RuntimeError) as raised:
            loop.run(nested())
        return str(raised.value)

    assert "within its own call" in elsewhere(calls)
    assert elsewhere(lambda: loop.run(here()))


@pytest.mark.usefixtures("soon")
def test_an_error_of_the_call_is_raised_and_the_loop_goes_on(loop: LoopThread) -> None:
    async def fail() -> None:
        raise ValueError("no")

    def calls() -> int:
        loop.run(here())
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                loop.run(fail())
        return loop.run(here()) == threading.get_ident()

    assert elsewhere(calls)


def test_closing_ends_the_wait_of_the_thread_that_runs_the_loop() -> None:
    loop = LoopThread(nothing)
    waits = threading.Event()

    async def forever() -> None:
        waits.set()
        await asyncio.Event().wait()

    def calls() -> str:
        loop.run(here())
        with pytest.raises(RuntimeError) as raised:
            loop.run(forever())
        return str(raised.value)

    def close() -> None:
        assert waits.wait(60)
        loop.close()

    closing = threading.Thread(target=close)
    closing.start()
    assert "closed" in elsewhere(calls)
    closing.join(60)
    assert not closing.is_alive()
    assert loop._loop.is_closed()


def test_a_loop_without_references_ends_with_its_thread() -> None:
    loop = LoopThread(nothing)
    for _ in range(3):
        loop.run(here())
    inner = loop._loop
    thread = next(one for one in threading.enumerate() if one.name == "taxiway-client")
    del loop
    gc.collect()
    assert until(inner.is_closed)
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:.*fork")  # Python 3.12 and JAX warn of what this test is about
@pytest.mark.usefixtures("soon")
def test_a_child_is_refused_and_its_parent_goes_on_running_the_loop(loop: LoopThread) -> None:
    def calls() -> tuple[int, bool]:
        loop.run(here())
        loop.run(here())
        child = os.fork()
        if child == 0:
            try:
                loop.run(here())
            except RuntimeError as error:
                os._exit(0 if "fork" in str(error) else 1)
            os._exit(2)
        ran_here = loop.run(here()) == threading.get_ident()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ran_here

    assert elsewhere(calls) == (0, True)


SIGNALLED = """
import asyncio, os, signal, threading, time
from taxiway.client import sync_client
from taxiway.client.sync_client import LoopThread

sync_client.HAND_BACK = 30.0
async def nothing(): pass
async def here(): return threading.get_ident()
async def interrupted():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    await asyncio.Event().wait()
async def alarmed(over):
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    while not over: await asyncio.sleep(0.01)

loop = LoopThread(nothing)
loop.run(here())
print("drives", loop.run(here()) == threading.get_ident())
try:
    loop.run(interrupted())
except KeyboardInterrupt:
    print("interrupted")
print("handler", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print("drives", loop.run(here()) == threading.get_ident())

def late(*_):
    raise TimeoutError("late")

signal.signal(signal.SIGALRM, late)
print("drives", loop.run(here()) == threading.get_ident())
try:
    loop.run(alarmed([]))
except TimeoutError as error:
    print(error)
nested = []
signal.signal(signal.SIGALRM, lambda *_: nested.append(loop.run(here()) != threading.get_ident()))
loop.run(alarmed(nested))
print("nested", *nested)
loop.close()
print("closed")
"""


def test_an_interrupt_ends_the_call_and_a_programs_own_handlers_run_and_raise_as_ever() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "drives True",
        "interrupted",
        "handler True",
        "drives True",
        "drives False",
        "late",
        "nested True",
        "closed",
    ]


@pytest.mark.usefixtures("soon")
def test_an_interrupt_while_the_loop_is_taken_over_ends_the_call(loop: LoopThread) -> None:
    interrupts = _Interrupts(loop._loop)

    def calls() -> bool:
        loop.run(here())
        assert loop._turns.begin()
        interrupts.came = True
        with pytest.raises(KeyboardInterrupt):
            loop._drive(asyncio.sleep(30), interrupts)
        loop._turns.end()
        return loop.run(here()) == threading.get_ident()

    assert elsewhere(calls)


def test_a_second_interrupt_is_raised_at_once() -> None:
    program = SIGNALLED.partition("try:")[0] + (
        "async def stubborn():\n"
        "    while True:\n"
        "        try: await interrupted()\n"
        "        except asyncio.CancelledError: pass\n"
        "try: loop.run(stubborn())\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "print(loop.run(here()) > 0, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["drives True", "interrupted", "True"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
