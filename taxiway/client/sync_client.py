"""The synchronous client: the asyncio client, on an event loop of a background thread.

`gevent.monkey` may have replaced threads and locks by those of greenlets. The event loop then still runs on a thread of
the operating system: in a greenlet it would be the running loop of all greenlets. gevent's locks lose wake-ups between
such threads, so a greenlet waits for its hub's watcher instead.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack

from taxiway.client.arrays import WITHIN, AsyncJobArray, unwatched
from taxiway.client.asyncio_client import (
    CONNECT_TIMEOUT,
    REQUESTS_AT_ONCE,
    AsyncClient,
    AsyncJob,
    Options,
    PerProcess,
    Progress,
)
from taxiway.contract.job import Result
from taxiway.contract.wire import Durability
from taxiway.errors import TaxiwayError
from taxiway.running import end

P = ParamSpec("P")
T = TypeVar("T")
Own = TypeVar("Own")
Handle = TypeVar("Handle", AsyncJob, AsyncJobArray)

Last = Callable[[], Coroutine[Any, Any, None]]


class LoopThread:
    """Runs coroutines for any number of threads, on a thread of its own.

    It ends on `close`, on garbage collection, or at interpreter exit. `last` runs on the loop before it ends.

    A loop that its only caller drives saves two thread switches a call: 26 us of this process's time at redis:// and 76
    at http://, 1 and 5 % of the p50 of an idle round trip (300 calls of each in turns). anyio's portal takes 100 us
    more than this thread.
    """

    def __init__(self, last: Last) -> None:
        self._process = os.getpid()
        self._loop = _new_loop()
        ended: Future[None] = Future()
        _start_thread(partial(_serve, self._loop, ended))
        self._stop = weakref.finalize(self, _stop, self._loop, ended, self._process, last)

    @property
    def alive(self) -> bool:
        """Whether coroutines can run here: not closed, and not a forked copy."""
        return self._stop.alive and os.getpid() == self._process

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's value. An interrupt (KeyboardInterrupt) cancels it and is raised here."""
        if asyncio._get_running_loop() is self._loop:  # an input's own code, or a finalizer: it would wait for itself
            coroutine.close()
            raise RuntimeError("this client was called from within its own call")
        future = self.start(coroutine)
        try:
            return _result_of(future)
        finally:
            future.cancel()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine and return at once.

        Raises:
            RuntimeError: the loop is closed, or belongs to the process that this one was forked from.
        """
        if not self.alive:
            coroutine.close()
            if os.getpid() != self._process:
                raise RuntimeError("this stream belongs to the parent process: open another one after a fork")
            raise RuntimeError("this client is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel running coroutines and end the thread. Closing twice has no effect."""
        self._stop()


def _serve(loop: asyncio.AbstractEventLoop, ended: Future[None]) -> None:
    loop.run_forever()
    loop.close()
    ended.set_result(None)


def _stop(loop: asyncio.AbstractEventLoop, ended: Future[None], process: int, last: Last) -> None:
    if os.getpid() != process:
        return
    ending = asyncio.run_coroutine_threadsafe(_end(last), loop)
    ending.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    if asyncio._get_running_loop() is not loop:  # else it was collected where the loop runs: no wait can end there
        _result_of(ending)
        _result_of(ended)


async def _end(last: Last) -> None:
    await last()
    await end(asyncio.all_tasks() - {asyncio.current_task()})


def _monkey() -> Any:
    """The module `gevent.monkey` if it has replaced threads by greenlets, else None."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey if monkey is not None and monkey.is_module_patched("threading") else None


def _new_loop() -> asyncio.AbstractEventLoop:
    """An event loop for a thread of its own."""
    if (monkey := _monkey()) is None:
        return asyncio.new_event_loop()
    return asyncio.SelectorEventLoop(monkey.get_original("selectors", "DefaultSelector")())


def _start_thread(target: Callable[[], None]) -> None:
    """Run `target` on a daemon thread of the operating system."""
    if (monkey := _monkey()) is None:
        threading.Thread(target=target, name="taxiway-client", daemon=True).start()
    else:
        monkey.get_original("_thread", "start_new_thread")(target, ())


def _result_of(future: Future[T]) -> T:
    """Wait for the future's result.

    Raises:
        RuntimeError: the client was closed.
    """
    if (monkey := _monkey()) is not None:
        _wait(future, monkey)
    try:
        return future.result()
    except CancelledError as error:
        raise RuntimeError("this client was closed while it waited") from error


def _wait(future: Future[Any], monkey: Any) -> None:
    """Wait in a greenlet, while others run, for what ends on a thread of the operating system."""
    gevent, lock = sys.modules["gevent"], monkey.get_original("_thread", "allocate_lock")()
    came, watcher = gevent.event.Event(), gevent.get_hub().loop.async_()
    watcher.start(came.set)
    waiting = [watcher]

    def wake(_: Future[Any]) -> None:
        with lock:
            for one in waiting:
                one.send()

    future.add_done_callback(wake)
    try:
        came.wait()
    finally:
        with lock:
            waiting.clear()
            watcher.close()


class _OnLoop(Generic[Own]):
    """The synchronous form of an object of the asyncio client, whose methods run on the loop."""

    def __init__(self, loops: PerProcess[LoopThread], own: Own) -> None:
        self._loops = loops
        self._own = own

    @property
    def _loop(self) -> LoopThread:
        return self._loops.get()


def _blocking(
    method: Callable[Concatenate[Own, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_OnLoop[Own], P], T]:
    """A method that blocks until that of the asyncio client has run."""

    @wraps(method)
    def call(self: _OnLoop[Own], /, *args: P.args, **options: P.kwargs) -> T:
        return self._loop.run(method(self._own, *args, **options))

    return call


def _iterating(
    method: Callable[Concatenate[Own, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[_OnLoop[Own], P], Iterator[T]]:
    """A method whose iterator blocks for each of what that of the asyncio client yields."""

    @wraps(method)
    def call(self: _OnLoop[Own], /, *args: P.args, **options: P.kwargs) -> Iterator[T]:
        return _iterate(self._loop, method(self._own, *args, **options))

    return call


class _Named(_OnLoop[Handle]):
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    @property
    def id(self) -> str:
        """Its id, the same at every interface."""
        return self._own.id


class Job(_Named[AsyncJob]):
    """A job in the fleet. It has the methods of `AsyncJob`; they block."""

    result = _blocking(AsyncJob.result)
    stream = _iterating(AsyncJob.stream)
    progress = _iterating(AsyncJob.progress)
    status = _blocking(AsyncJob.status)
    placement = _blocking(AsyncJob.placement)
    done = _blocking(AsyncJob.done)
    cancel = _blocking(AsyncJob.cancel)


class JobArray(_Named[AsyncJobArray]):
    """An array in the fleet. It has the methods of `AsyncJobArray`; they block."""

    progress = _blocking(AsyncJobArray.progress)
    wait = _blocking(AsyncJobArray.wait)
    outcomes = _iterating(AsyncJobArray.outcomes)
    results = _blocking(AsyncJobArray.results)
    cancel = _blocking(AsyncJobArray.cancel)

    def __iter__(self) -> Iterator[Result | TaxiwayError]:
        return self.outcomes()

    def retry(self) -> JobArray:
        """A new array of the members that were not answered."""
        return JobArray(self._loops, self._loop.run(self._own.retry()))


class Client(_OnLoop[AsyncClient]):
    """A thread-safe client. It has the methods and arguments of `AsyncClient`; the methods block.

    An interrupt (Ctrl-C) ends the call, not the client. A forked child makes connections of its own.
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
        own = AsyncClient(
            url, key=key, connect_timeout=connect_timeout, arrays=arrays, durability=durability, replicas=replicas
        )
        super().__init__(PerProcess(partial(LoopThread, own.close)), own)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, model: str, inputs: Any, **options: Unpack[Options]) -> Job:
        """Submit a request. It is durable when this returns."""
        return Job(self._loops, self._loop.run(self._own.submit(model, inputs, **options)))

    def array(self, model: str, inputs: Iterable[Any], *, within: str = WITHIN, **options: Unpack[Options]) -> JobArray:
        """Submit a request for each of `inputs` as one array, which the fleet keeps; see `AsyncClient.array`."""
        made = self._own.array(model, inputs, within=within, **options)
        return JobArray(self._loops, self._loop.run(made))

    infer = _blocking(AsyncClient.infer)
    stream = _iterating(AsyncClient.stream)

    def map(
        self,
        model: str,
        inputs: Iterable[Any],
        *,
        window: int = REQUESTS_AT_ONCE,
        timeout: float | None = None,
        progress: Progress = unwatched,
        **options: Unpack[Options],
    ) -> Iterator[Result]:
        """Yield the result of each of `inputs`, in order, with at most `window` requests in progress.

        `inputs` is read in the caller's thread. See `AsyncClient.map` for failures and progress.
        """
        infer_one = self._own.inference_of(model, timeout, options)
        running: deque[Future[Result]] = deque()
        count = 0
        try:
            for one in inputs:
                running.append(self._loop.start(infer_one(one)))
                if len(running) >= window:
                    yield _result_of(running.popleft())
                    progress(count := count + 1)
            while running:
                yield _result_of(running.popleft())
                progress(count := count + 1)
        finally:
            for future in running:
                future.cancel()

    def job(self, id: str) -> Job:
        """A handle for the job with this id, submitted by any client. Sends nothing."""
        return Job(self._loops, self._own.job(id))

    what_if = _blocking(AsyncClient.what_if)
    jobs = _blocking(AsyncClient.jobs)
    models = _blocking(AsyncClient.models)
    fleet = _blocking(AsyncClient.fleet)
    drain = _blocking(AsyncClient.drain)
    resume = _blocking(AsyncClient.resume)

    def close(self) -> None:
        """Close all connections; jobs continue. Closing twice has no effect."""
        self._loop.close()


def _iterate(loop: LoopThread, events: AsyncGenerator[T, None]) -> Iterator[T]:
    """Iterate over events that are read on the loop."""

    async def next_event() -> T | None:
        return await anext(events, None)

    async def stop() -> None:
        await events.aclose()

    try:
        while (event := loop.run(next_event())) is not None:
            yield event
    finally:
        if loop.alive:  # else closing the client has closed the reader
            loop.run(stop())
