"""Connections that other fleets opened to take work on: each waits for a worker of this fleet, then is joined to it.

The worker reads in the state store where one waits, connects to the router that has it, and speaks to the other fleet
as over a connection of its own: messages are passed on as they are, no faster than the receiver reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from api.gate import Receive, Send
from api.peers.connection import PeerError
from api.routing.stores import LINE_KEPT_EVERY, ValueStore
from taxiway.contract.peers import VERSION, WRONG_FRAME, WRONG_VERSION, PeerServe, WaitingLine
from taxiway.errors import BrokerUnavailableError, UnknownObjectError

MOST_WAITING = 64
"""Connections of one peer that wait in one router; the one that has waited longest is closed for a further one."""


class WaitingLines:
    """The connections that wait in this router.

    `reached` is where workers reach it, without a token; without a URL, it is where the peer or its proxy does.
    """

    def __init__(self, store: ValueStore, reached: WaitingLine) -> None:
        self._store, self._reached = store, reached
        self._lines: dict[str, _Line] = {}

    async def hold(
        self,
        peer: str,
        first: PeerServe,
        scope: Mapping[str, Any],
        ends: tuple[Receive, Send],
        valid: Callable[[], bool],
    ) -> None:
        """Keep a peer's connection until either side leaves.

        Raises:
            PeerError: it speaks unasked or another version, or its key has ended.
        """
        if first.version != VERSION:
            raise PeerError(WRONG_VERSION, f"expected version {VERSION} of the protocol, got {first.version}")
        line = _Line(peer, ends[1])
        token = secrets.token_urlsafe(32)
        waiting = [one for one in self._lines.values() if one.peer == peer]
        for oldest in waiting[: -MOST_WAITING + 1]:
            await oldest.end(oldest.peer_end)
        self._lines[token] = line
        place = WaitingLine(self._reached.url or _address(scope), token, self._reached.certificate)
        tasks = [asyncio.create_task(one) for one in (line.pass_on(ends[0]), self._tell(place, line, valid))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._lines.pop(token, None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await line.end(line.worker_end)

    async def take(self, token: str, receive: Receive, send: Send) -> None:
        """Join a worker's connection to the one with this token.

        Raises:
            UnknownObjectError: it waits no longer.
        """
        line = self._lines.pop(token, None)
        if line is None:
            raise UnknownObjectError("no such connection waits for work")
        await receive()  # it connects
        await send({"type": "websocket.accept"})
        line.worker_end = send
        try:
            while (event := await receive())["type"] == "websocket.receive":
                await line.peer_end(_message(event))
        finally:
            await line.end(line.peer_end)

    async def _tell(self, place: WaitingLine, line: _Line, valid: Callable[[], bool]) -> None:
        """Have workers find the connection while it waits."""
        while valid():
            if place.token in self._lines:
                with contextlib.suppress(BrokerUnavailableError):
                    await self._store.keep_line(line.peer, place)
            await asyncio.sleep(LINE_KEPT_EVERY)
        raise PeerError(WRONG_FRAME, "the key has ended")


@dataclass(slots=True)
class _Line:
    """A peer's connection, and that of the worker that took it."""

    peer: str
    peer_end: Send
    worker_end: Send | None = None
    _ended: bool = False

    async def pass_on(self, receive: Receive) -> None:
        """Pass on what the peer sends to the worker, until it leaves."""
        while (event := await receive())["type"] == "websocket.receive":
            if self.worker_end is None:
                raise PeerError(WRONG_FRAME, "expected nothing before hello")
            await self.worker_end(_message(event))

    async def end(self, other: Send | None) -> None:
        """Close the other connection as one has ended."""
        if not self._ended and other is not None:
            self._ended = True
            with contextlib.suppress(OSError):
                await other({"type": "websocket.close", "code": 1001, "reason": "the other side has left"})


def _message(event: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "websocket.send", "bytes": event.get("bytes") or b""}


def _address(scope: Mapping[str, Any]) -> str:
    """Where this router was reached, by a proxy or the peer itself."""
    host, port = scope["server"]
    return f"{'https' if scope['scheme'] == 'wss' else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
