"""An event loop on a background thread, for synchronous callers."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")

Last = Callable[[], Coroutine[Any, Any, None]]


class LoopThread:
    """Runs coroutines for any number of threads. It ends on `close`, on garbage collection, or at interpreter exit.

    `last` runs on the loop before it ends.
    """

    def __init__(self, last: Last) -> None:
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="taxiway-client", daemon=True)
        thread.start()
        self._stop = weakref.finalize(self, _stop, self._loop, thread, self._process, last)

    @property
    def alive(self) -> bool:
        """Whether coroutines can run here: not closed, and not a forked copy."""
        return self._stop.alive and os.getpid() == self._process

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's value. An interrupt (KeyboardInterrupt) cancels it and is raised here."""
        future = self.start(coroutine)
        try:
            return future.result()
        except CancelledError as error:
            raise RuntimeError("this client was closed while it waited") from error
        finally:
            future.cancel()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine and return at once.

        Raises:
            RuntimeError: the loop is closed, or belongs to the process that this one was forked from.
        """
        if os.getpid() != self._process:
            coroutine.close()
            raise RuntimeError("this client belongs to the parent process: make a new one after a fork")
        if not self._stop.alive:
            coroutine.close()
            raise RuntimeError("this client is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel running coroutines and end the thread. Closing twice has no effect."""
        self._stop()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, process: int, last: Last) -> None:
    if os.getpid() != process:
        return
    ending = asyncio.run_coroutine_threadsafe(_end(last), loop)
    if threading.current_thread() is thread:  # collected on the loop's own thread: it cannot join itself
        ending.add_done_callback(lambda _: loop.stop())
        return
    ending.result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _end(last: Last) -> None:
    await last()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
