"""TCP servers in the tests' process, which leave no socket open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from tests.waiting import in_thread

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Serves one connection. What it still does when the server stops is cancelled."""

_TURNS = 20
"""Turns of the loop in which its transports open or close, those of TLS after some messages."""


@contextlib.asynccontextmanager
async def accepting(serve: Serve, port: int = 0, **options: Any) -> AsyncIterator[int]:
    """Serve connections to a port of 127.0.0.1, a free one unless given, until the block ends; yields the port.

    Connections that are open then are aborted: one that is closed waits for the other side.
    """
    accepted: dict[asyncio.StreamWriter, asyncio.Future[None]] = {}

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted[writer] = asyncio.ensure_future(serve(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", port, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await _turns()  # what was accepted has its task then
        for task in accepted.values():
            task.cancel()
        await asyncio.gather(*accepted.values(), return_exceptions=True)
        for writer in accepted:
            writer.transport.abort()
        await server.wait_closed()
        await _turns()


async def _turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


@contextlib.contextmanager
def listening(serve: Serve, port: int = 0, **options: Any) -> Iterator[int]:
    """The same in a thread of its own."""
    loop, stopped, began = asyncio.new_event_loop(), asyncio.Event(), Future[int]()

    async def run() -> None:
        async with accepting(serve, port, **options) as listens:
            began.set_result(listens)
            await stopped.wait()

    stop = partial(loop.call_soon_threadsafe, stopped.set)
    with contextlib.closing(loop), in_thread(lambda: loop.run_until_complete(run()), stop=stop):
        yield began.result(60)
