"""The synchronous client: the asyncio client, on an event loop that the caller runs, or else a background thread."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar, Unpack

from taxiway.client.asyncio_client import (
    CONNECT_TIMEOUT,
    WINDOW,
    AsyncClient,
    AsyncJob,
    Options,
    Progress,
    ended,
    no_progress,
)
from taxiway.client.forking import PerProcess
from taxiway.client.greenlets import Ended, in_greenlets, new_loop, new_queue, result_of, start_thread
from taxiway.contract.job import Event, EventStream, JobStatus, Result
from taxiway.contract.listing import USUAL, JobPage
from taxiway.contract.wire import Durability

T = TypeVar("T")

Last = Callable[[], Coroutine[Any, Any, None]]


HAND_BACK = 0.1
"""Seconds without a call after which the background thread runs the loop: timers and pings are late by this at most."""

CONTENDED = 1.0
"""Seconds without driving callers after two threads used a client at once: handing the loop over costs each of them."""

_NAMES = "ABRT ALRM CHLD HUP IO PROF QUIT TERM TSTP USR1 USR2 VTALRM WINCH"
_HANDLED = [getattr(signal, f"SIG{name}") for name in _NAMES.split() if hasattr(signal, f"SIG{name}")]
"""Signals that programs handle, besides SIGINT."""


class _Turns:
    """Who runs the loop: the background thread, or the only thread that calls. `changed` guards all of it.

    `server` is the background thread, `driver` the calling thread that runs it; `pending` counts the coroutines that no
    caller drives.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.changed = threading.Condition()
        self.driver: int | None = None
        self.pending = 0
        self.closing = False
        self.server = 0
        self.ended: Future[None] = Future()
        self._loop = loop
        self._serving = True
        self._waits_for_driver = False
        self._began = self._called = -math.inf  # when the last driven call began, and any last one ended
        self._contended = -math.inf

    def serve(self) -> None:
        """Run the loop whenever no caller does, until closed; on the background thread."""
        self.server = threading.get_ident()
        while self._await_turn():
            self._loop.run_forever()
            with self.changed:
                self._serving = False
                self.changed.notify_all()
        self.ended.set_result(None)

    def begin(self) -> bool:
        """Take the loop over for a call; False if the background thread, or another caller, shall run the call."""
        with self.changed:
            now = time.monotonic()
            if self.driver is not None:
                self._contended = now
            if self.driver is not None or self.pending or self.closing or now - self._contended < CONTENDED:
                return False
            if self._serving and now - self._called >= HAND_BACK:
                return False  # a call now and then: handing over would cost as much as it saves
            self.driver, self._began = threading.get_ident(), now
            try:
                if self._serving:
                    self._loop.call_soon_threadsafe(self._loop.stop)
                    self.changed.wait_for(lambda: not self._serving)
            except BaseException:  # a second interrupt
                self.driver = None
                self.changed.notify_all()
                raise
            return True

    def end(self) -> None:
        """The call that was begun has ended: give the loop back, at once if it is waited for."""
        with self.changed:
            self.driver, self._called = None, time.monotonic()
            if self.pending or self.closing or self._waits_for_driver:
                self.changed.notify_all()

    def add(self) -> None:
        """A coroutine is to run that no caller drives."""
        with self.changed:
            self.pending += 1
            if self.driver is not None:
                self._contended = time.monotonic()
            elif not self._serving:
                self.changed.notify_all()

    def remove(self, _: Future[Any]) -> None:
        """It has ended."""
        with self.changed:
            self.pending -= 1
            self._called = time.monotonic()

    def close(self) -> None:
        """End `serve`."""
        with self.changed:
            self.closing = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self.changed.notify_all()

    def wait_for_driver(self) -> None:
        """Wait until no caller runs the loop."""
        with self.changed:
            self.changed.wait_for(lambda: self.driver is None)

    def _await_turn(self) -> bool:
        """Wait until the background thread is to run the loop; False if it is to end."""
        with self.changed:
            while not self.closing:
                now = time.monotonic()
                left = self._called + HAND_BACK - now
                if self.driver is None and (self.pending or left <= 0):
                    self._serving = True
                    return True
                self._waits_for_driver = self.driver is not None and now - self._began >= HAND_BACK
                short = HAND_BACK if self.driver is not None else left  # to be woken after each call would cost more
                self.changed.wait(None if self._waits_for_driver else short)
                self._waits_for_driver = False
        return False


class LoopThread:
    """Runs coroutines for any number of threads. It ends on `close`, on garbage collection, or at interpreter exit.

    A thread that is the only one to wait runs the loop itself, which saves two thread switches a call. Else, and while
    no thread calls, a background thread does. `last` runs on the loop before it ends.
    """

    def __init__(self, last: Last) -> None:
        self._process = os.getpid()
        self._loop = new_loop()
        self._turns = _Turns(self._loop)
        start_thread(self._turns.serve)
        self._stop = weakref.finalize(self, _stop, self._loop, self._turns, self._process, last)

    @property
    def alive(self) -> bool:
        """Whether coroutines can run here: not closed, and not a forked copy."""
        return self._stop.alive and os.getpid() == self._process

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's value. An interrupt (KeyboardInterrupt) cancels it and is raised here."""
        self._check(coroutine)
        if self._turns.driver == threading.get_ident():  # an input's own code, or a finalizer: it would wait for itself
            coroutine.close()
            raise RuntimeError("this client was called from within its own call")
        if _may_run_loop():
            with _Interrupts(self._loop) as interrupts:
                if self._turns.begin():
                    return self._drive(coroutine, interrupts)
        return self._wait(coroutine)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine and return at once.

        Raises:
            RuntimeError: the loop is closed, or belongs to the process that this one was forked from.
        """
        self._check(coroutine)
        return _start(self._loop, self._turns, coroutine)

    def close(self) -> None:
        """Cancel running coroutines and end the thread. Closing twice has no effect."""
        self._stop()

    def _check(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        if os.getpid() != self._process:
            coroutine.close()
            raise RuntimeError("this stream belongs to the parent process: open another one after a fork")
        if not self._stop.alive:
            coroutine.close()
            raise RuntimeError("this client is closed")

    def _drive(self, coroutine: Coroutine[Any, Any, T], interrupts: _Interrupts) -> T:
        """Run the loop, which was taken over, until the coroutine has ended, and give it back."""
        task = interrupts.cancelled = self._loop.create_task(coroutine)
        if interrupts.came:
            task.cancel()
        try:
            value: T = self._loop.run_until_complete(task)
            return value
        except asyncio.CancelledError as error:
            if interrupts.came:
                raise KeyboardInterrupt from None
            raise RuntimeError("this client was closed while it waited") from error
        finally:
            task.cancel()  # after a second interrupt it has not ended
            self._turns.end()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the thread that runs the loop."""
        future = _start(self._loop, self._turns, coroutine)
        try:
            return result_of(future)
        except CancelledError as error:
            raise RuntimeError("this client was closed while it waited") from error
        finally:
            future.cancel()


class _Interrupts:
    """Defers Ctrl-C on the main thread, as asyncio does: raised between two callbacks' lines, it would break the loop.

    The first cancels the task `cancelled`, and is raised at the end; a second one is raised at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.cancelled: asyncio.Task[Any] | None = None
        self._loop = loop
        self.came = False
        self._defers = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._defers = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._defers:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._defers:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.came and kind is not KeyboardInterrupt:
            raise KeyboardInterrupt

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        if self.cancelled is not None:
            self.cancelled.cancel()
            self._loop.call_soon_threadsafe(lambda: None)


def _may_run_loop() -> bool:
    """Whether this thread may run an event loop: it runs none, and no signal handler of the program runs on it.

    What such a handler raises would end in one of the loop's callbacks, not at the caller. A greenlet may not: its
    thread's other greenlets would find the loop running in theirs.
    """
    if asyncio._get_running_loop() is not None or in_greenlets():
        return False
    if threading.current_thread() is not threading.main_thread():
        return True
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, *_HANDLED)]
    return not any(callable(handler) and handler is not signal.default_int_handler for handler in handlers)


def _start(loop: asyncio.AbstractEventLoop, turns: _Turns, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start the coroutine, which the thread that runs the loop runs too."""
    turns.add()
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    future.add_done_callback(turns.remove)
    return future


def _stop(loop: asyncio.AbstractEventLoop, turns: _Turns, process: int, last: Last) -> None:
    if os.getpid() != process:
        return
    ending = _start(loop, turns, _end(last))
    if threading.get_ident() in (turns.server, turns.driver):  # collected where the loop runs: no wait can end there
        ending.add_done_callback(lambda _: turns.close())
        return
    result_of(ending)
    turns.close()
    result_of(turns.ended)
    turns.wait_for_driver()
    loop.close()


async def _end(last: Last) -> None:
    await last()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Job:
    """A job in the fleet. It has the methods of `AsyncJob`; they block."""

    def __init__(self, loops: PerProcess[LoopThread], job: AsyncJob) -> None:
        self._loops = loops
        self._job = job

    @property
    def _loop(self) -> LoopThread:
        return self._loops.get()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    @property
    def id(self) -> str:
        """The job's id, the same at every door."""
        return self._job.id

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the job's result; see `AsyncJob.result` for `timeout` and the errors raised."""
        return self._loop.run(self._job.result(timeout))

    def stream(self, timeout: float | None = None) -> Iterator[Event | Result]:
        """Stream a generated answer, then the result; see `AsyncJob.stream`."""
        return _iterate(self._loop, self._job.stream(timeout))

    def status(self) -> JobStatus:
        """The job's current state."""
        return self._loop.run(self._job.status())

    def placement(self) -> dict[str, Any]:
        """Why the job was placed where it is."""
        return self._loop.run(self._job.placement())

    def done(self) -> bool:
        """Whether the job has ended: succeeded, failed, cancelled or expired."""
        return self._loop.run(self._job.done())

    def cancel(self) -> bool:
        """Request cancellation; returns whether the job was cancelled: see `AsyncJob.cancel`."""
        return self._loop.run(self._job.cancel())


class Client:
    """A thread-safe client. It has the methods and arguments of `AsyncClient`; the methods block.

    An interrupt (Ctrl-C) ends the call, not the client. In a forked child it connects anew.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        arrays: bool = False,
        durability: Durability = "written",
        replicas: int = 1,
    ) -> None:
        self._client = AsyncClient(
            url, key=key, connect_timeout=connect_timeout, arrays=arrays, durability=durability, replicas=replicas
        )
        self._loops = PerProcess(partial(LoopThread, self._client.close))

    @property
    def _loop(self) -> LoopThread:
        return self._loops.get()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, model: str, inputs: Any, **options: Unpack[Options]) -> Job:
        """Submit a request. It is durable when this returns."""
        return Job(self._loops, self._loop.run(self._client.submit(model, inputs, **options)))

    def infer(self, model: str, inputs: Any, *, timeout: float | None = None, **options: Unpack[Options]) -> Result:
        """Submit and wait for the answer, at most `timeout` seconds."""
        return self._loop.run(self._client.infer(model, inputs, timeout=timeout, **options))

    def stream(
        self, model: str, inputs: Any, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Iterator[Event | Result]:
        """Submit and stream the answer as it is generated; see `AsyncClient.stream`."""
        return _iterate(self._loop, self._client.stream(model, inputs, timeout=timeout, **options))

    def map(
        self,
        model: str,
        inputs: Iterable[Any],
        *,
        window: int = WINDOW,
        timeout: float | None = None,
        progress: Progress = no_progress,
        **options: Unpack[Options],
    ) -> Iterator[Result]:
        """Yield the result of each of `inputs`, in order, with at most `window` requests in progress.

        `inputs` is read in the caller's thread. See `AsyncClient.map` for failures and progress.
        """
        infer_one = self._client.inference_of(model, timeout, options)
        running: deque[Future[Result]] = deque()
        count = 0
        try:
            for one in inputs:
                running.append(self._loop.start(infer_one(one)))
                if len(running) >= window:
                    yield result_of(running.popleft())
                    progress(count := count + 1)
            while running:
                yield result_of(running.popleft())
                progress(count := count + 1)
        finally:
            for future in running:
                future.cancel()

    def map_as_completed(
        self,
        model: str,
        inputs: Iterable[Any],
        *,
        window: int = WINDOW,
        timeout: float | None = None,
        progress: Progress = no_progress,
        **options: Unpack[Options],
    ) -> Iterator[tuple[int, Result]]:
        """As `map`, but in order of completion; each result comes with its input's index, from 0."""
        infer_one = self._client.inference_of(model, timeout, options)
        places: dict[Future[Result], int] = {}
        ended: Ended[Future[Result]] = new_queue()
        count = 0
        try:
            for place, one in enumerate(inputs):
                future = self._loop.start(infer_one(one))
                places[future] = place
                future.add_done_callback(ended.put)
                if len(places) >= window:
                    future = ended.get()
                    yield places.pop(future), future.result()
                    progress(count := count + 1)
            while places:
                future = ended.get()
                yield places.pop(future), future.result()
                progress(count := count + 1)
        finally:
            for future in places:
                future.cancel()

    def as_completed(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Yield the jobs in the order in which they end; `result()` of each then returns immediately."""
        settled: Ended[Job] = new_queue()
        waiting = []
        try:
            for job in jobs:
                future = self._loop.start(ended(job._job))
                future.add_done_callback(lambda _, job=job: settled.put(job))  # type: ignore[misc]  # binds this job
                waiting.append(future)
            for _ in waiting:
                yield settled.get()
        finally:
            for future in waiting:
                future.cancel()

    def job(self, id: str) -> Job:
        """A handle for the job with this id, submitted by any client. Sends nothing."""
        return Job(self._loops, self._client.job(id))

    def what_if(self, model: str, inputs: Any, **options: Unpack[Options]) -> dict[str, Any]:
        """Where a request would run now, and why. Submits nothing. See `AsyncClient.what_if`."""
        return self._loop.run(self._client.what_if(model, inputs, **options))

    def jobs(
        self, *, states: Collection[str] = (), model: str = "", tenant: str = "", limit: int = USUAL, cursor: str = ""
    ) -> JobPage:
        """A page of the fleet's jobs, most recently accepted first: see `AsyncClient.jobs`."""
        page = self._client.jobs(states=states, model=model, tenant=tenant, limit=limit, cursor=cursor)
        return self._loop.run(page)

    def models(self) -> list[dict[str, Any]]:
        """What the fleet can run: names, versions, aliases, variants."""
        return self._loop.run(self._client.models())

    def fleet(self) -> dict[str, Any]:
        """The fleet's hardware classes and devices now. HTTP only, else `InvalidRequestError`."""
        return self._loop.run(self._client.fleet())

    def reload(self) -> list[dict[str, Any]]:
        """Make every router and worker reread its models folder now: see `AsyncClient.reload`."""
        return self._loop.run(self._client.reload())

    def load_model(self, name: str) -> dict[str, Any]:
        """Accept requests for a model, and load it on the classes that can run it: see `AsyncClient.load_model`."""
        return self._loop.run(self._client.load_model(name))

    def unload_model(self, name: str) -> dict[str, Any]:
        """Accept no more requests for a model: see `AsyncClient.unload_model`."""
        return self._loop.run(self._client.unload_model(name))

    def close(self) -> None:
        """Close all connections; jobs continue. Closing twice has no effect."""
        self._loop.close()


def _iterate(loop: LoopThread, events: EventStream) -> Iterator[Event | Result]:
    """Iterate over events that are read on the loop."""

    async def next_event() -> Event | Result | None:
        return await anext(events, None)

    async def stop() -> None:
        await events.aclose()

    try:
        while (event := loop.run(next_event())) is not None:
            yield event
    finally:
        if loop.alive:  # else closing the client has closed the reader
            loop.run(stop())
