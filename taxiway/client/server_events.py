"""Server-sent events from a router, over as many connections as it takes.

Source: HTML's "Server-sent events", of which routers send the fields `event`, `id` and `data`, each in one line.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from taxiway.client.http_link import HttpLink, Response
from taxiway.errors import BrokerUnavailableError

_LAST = "last-event-id"


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
    """The events at `path`; a connection that breaks is followed by another one, which is told the rest.

    It ends with the server's stream; `until` is a moment by the loop's clock.

    Raises:
        TimeoutError: `until` passed.
        BrokerUnavailableError: nobody answers.
        EndedError: the answer is no stream.
    """
    last, heard = "", True
    while heard:
        heard = False
        events: asyncio.Queue[ServerEvent | None] = asyncio.Queue()
        headers = {_LAST: last} if last else {}
        asking = asyncio.create_task(link.ask("GET", path, headers=headers, sink=EventParser(events.put_nowait).feed))
        asking.add_done_callback(lambda _, events=events: events.put_nowait(None))  # type: ignore[misc]  # binds these
        try:
            async with asyncio.timeout_at(until):
                event = await events.get()
            while event is not None:
                last, heard = event.id or last, True
                yield event
                async with asyncio.timeout_at(until):
                    event = await events.get()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        _check(asking, heard=heard)


class EndedError(Exception):
    """The server answered with something else than a stream of events."""

    def __init__(self, response: Response) -> None:
        super().__init__(f"{response.status} came instead of events")
        self.response = response


def _check(asking: asyncio.Task[Response], *, heard: bool) -> None:
    """Whether the stream that ended may be asked for anew."""
    try:
        response = asking.result()
    except BrokerUnavailableError:
        if not heard:
            raise
    else:
        if not response.ok:
            raise EndedError(response)
