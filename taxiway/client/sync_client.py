"""The synchronous client: the asyncio client, on an event loop that the caller runs, or else a background thread."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from taxiway.client.arrays import WITHIN, ArrayProgress, AsyncJobArray, Watch, unwatched
from taxiway.client.asyncio_client import (
    CONNECT_TIMEOUT,
    REQUESTS_AT_ONCE,
    AsyncClient,
    AsyncJob,
    Options,
    Progress,
    no_progress,
)
from taxiway.client.forking import PerProcess
from taxiway.client.greenlets import new_loop, result_of, start_thread
from taxiway.contract.job import JobStatus, Result
from taxiway.contract.progress import RunProgress
from taxiway.contract.stream import Event
from taxiway.contract.wire import Durability
from taxiway.errors import TaxiwayError
from taxiway.listing import USUAL, JobPage

T = TypeVar("T")

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
        self._loop = new_loop()
        ended: Future[None] = Future()
        start_thread(partial(_serve, self._loop, ended))
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
            return result_of(future)
        except CancelledError as error:
            raise RuntimeError("this client was closed while it waited") from error
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
        result_of(ending)
        result_of(ended)


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
        """The job's id, the same at every interface."""
        return self._job.id

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the job's result; see `AsyncJob.result` for `timeout` and the errors raised."""
        return self._loop.run(self._job.result(timeout))

    def stream(self, timeout: float | None = None) -> Iterator[Event | Result]:
        """Stream a generated answer, then the result; see `AsyncJob.stream`."""
        return _iterate(self._loop, self._job.stream(timeout))

    def progress(self, timeout: float | None = None) -> Iterator[RunProgress]:
        """What the job's callable reports, as it comes; see `AsyncJob.progress`."""
        return _iterate(self._loop, self._job.progress(timeout))

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


class JobArray:
    """An array in the fleet. It has the methods of `AsyncJobArray`; they block."""

    def __init__(self, loops: PerProcess[LoopThread], array: AsyncJobArray) -> None:
        self._loops = loops
        self._array = array

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    @property
    def id(self) -> str:
        """The array's id."""
        return self._array.id

    def progress(self) -> ArrayProgress:
        """How far it is."""
        return self._loops.get().run(self._array.progress())

    def wait(self, timeout: float | None = None, watch: Watch = unwatched) -> ArrayProgress:
        """Wait until it has ended; see `AsyncJobArray.wait`."""
        return self._loops.get().run(self._array.wait(timeout, watch))

    def __iter__(self) -> Iterator[Result | TaxiwayError]:
        return self.outcomes()

    def outcomes(self, timeout: float | None = None, watch: Watch = unwatched) -> Iterator[Result | TaxiwayError]:
        """Each member's result or error, in the order of the inputs, as they end; see `AsyncJobArray.outcomes`."""
        return _iterate(self._loops.get(), self._array.outcomes(timeout, watch))

    def results(self, timeout: float | None = None, watch: Watch = unwatched) -> list[Result | TaxiwayError]:
        """All `outcomes`, once it has ended."""
        return self._loops.get().run(self._array.results(timeout, watch))

    def cancel(self) -> None:
        """Cancel the members that have not ended."""
        self._loops.get().run(self._array.cancel())

    def retry(self) -> JobArray:
        """A new array of the members that were not answered."""
        return JobArray(self._loops, self._loops.get().run(self._array.retry()))


class Client:
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

    def array(self, model: str, inputs: Iterable[Any], *, within: str = WITHIN, **options: Unpack[Options]) -> JobArray:
        """Submit a request for each of `inputs` as one array, which the fleet keeps; see `AsyncClient.array`."""
        made = self._client.array(model, inputs, within=within, **options)
        return JobArray(self._loops, self._loop.run(made))

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
        window: int = REQUESTS_AT_ONCE,
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

    def drain(self) -> dict[str, Any]:
        """Hand the fleet's work to other fleets: see `AsyncClient.drain`."""
        return self._loop.run(self._client.drain())

    def resume(self) -> dict[str, Any]:
        """Serve again after `drain`: see `AsyncClient.resume`."""
        return self._loop.run(self._client.resume())

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
