"""A client's loop runs on a thread of its own, for any number of threads."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from taxiway.client.sync_client import LoopThread
from tests.waiting import until


async def nothing() -> None:
    """What runs on the loop before it ends."""


async def here() -> int:
    """The thread that runs the loop."""
    return threading.get_ident()


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    opened = LoopThread(nothing)
    yield opened
    opened.close()


def elsewhere(body: Callable[[], Any]) -> Any:
    """What a function returns on another thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(body()))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0]


def test_a_call_within_another_event_loop_is_answered(loop: LoopThread) -> None:
    async def nested() -> int:
        return loop.run(here())

    assert asyncio.run(nested()) != threading.get_ident()


def test_a_call_from_within_a_call_is_refused_instead_of_waiting_for_itself(loop: LoopThread) -> None:
    async def nested() -> None:
        loop.run(here())

    with pytest.raises(RuntimeError, match="within its own call"):
        loop.run(nested())
    assert loop.run(here())


def test_closing_ends_the_waits_of_other_threads() -> None:
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
def test_a_child_is_refused_and_its_parent_goes_on(loop: LoopThread) -> None:
    loop.run(here())
    child = os.fork()
    if child == 0:
        try:
            loop.run(here())
        except RuntimeError as error:
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loop.run(here())


SIGNALLED = """
import asyncio, os, signal, threading
from taxiway.client.sync_client import LoopThread

async def nothing(): pass
async def here(): return threading.get_ident()
cancelled = threading.Event()
async def interrupted():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    try: await asyncio.Event().wait()
    finally: cancelled.set()
async def alarmed(over):
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    while not over: await asyncio.sleep(0.01)

loop = LoopThread(nothing)
try:
    loop.run(interrupted())
except KeyboardInterrupt:
    print("interrupted", cancelled.wait(60))

def late(*_):
    raise TimeoutError("late")

signal.signal(signal.SIGALRM, late)
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
    assert done.stdout.splitlines() == ["interrupted True", "late", "nested True", "closed"]
