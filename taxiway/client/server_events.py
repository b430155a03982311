"""Server-sent events from a router, over as many connections as it takes.

Source: HTML's "Server-sent events", of which routers send the fields `event`, `id` and `data`, each in one line.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from taxiway.client.http_link import BrokenOffError, HttpLink, Response

_LAST = "last-event-id"

_PAUSE = 0.05
"""Seconds before a stream that ended is asked for anew."""


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event; the `kind` of most is empty."""

    kind: str
    id: str
    data: bytes


class EventParser:
    """Finds events in a body that comes in pieces of any length."""

    def __init__(self, found: Callable[[ServerEvent], None]) -> None:
        self._found = found
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        *events, self._rest = (self._rest + piece).split(b"\n\n")
        for lines in events:
            fields = dict(line.split(b": ", 1) for line in lines.split(b"\n") if b": " in line)
            if b"data" in fields:
                self._found(
                    ServerEvent(fields.get(b"event", b"").decode(), fields.get(b"id", b"").decode(), fields[b"data"])
                )


async def read_events(link: HttpLink, path: str, until: float | None) -> AsyncGenerator[ServerEvent, None]:
    """The events at `path`; a connection or a stream that ends is followed by another one, which is told the rest.

    A router that stops ends its streams wherever they are: it is for the reader to know the last event.
    `until` is a moment by the loop's clock.

    Raises:
        TimeoutError: `until` passed.
        BrokerUnavailableError: nobody answers, or they broke off for the link's patience.
        EndedError: the answer is no stream.
    """
    clock = asyncio.get_running_loop().time
    last, well = "", clock()
    while True:
        began = clock()
        events: asyncio.Queue[ServerEvent | None] = asyncio.Queue()
        headers = {_LAST: last} if last else {}
        asking = asyncio.create_task(link.ask("GET", path, headers=headers, sink=EventParser(events.put_nowait).feed))
        asking.add_done_callback(lambda _, events=events: events.put_nowait(None))  # type: ignore[misc]  # binds these
        try:
            while (event := await _next(events, until)) is not None:
                last = event.id or last
                yield event
                well = clock()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        well = clock() if clock() - began > link.patience else well
        if not _goes_on(asking, again=clock() - well < link.patience):
            return
        await asyncio.sleep(_PAUSE)


async def _next(events: asyncio.Queue[ServerEvent | None], until: float | None) -> ServerEvent | None:
    async with asyncio.timeout_at(until):
        return await events.get()


class EndedError(Exception):
    """The server answered with something else than a stream of events."""

    def __init__(self, response: Response) -> None:
        super().__init__(f"{response.status} came instead of events")
        self.response = response


def _goes_on(asking: asyncio.Task[Response], *, again: bool) -> bool:
    """Whether the stream that ended is asked for anew, as long as it may be."""
    try:
        response = asking.result()
    except BrokenOffError:
        if not again:
            raise
    else:
        if not response.ok:
            raise EndedError(response)
    return again
