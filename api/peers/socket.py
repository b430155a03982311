"""`GET /v2/peers`: the WebSocket of other fleets, beside the HTTP API in its process.

Connections that other fleets opened to take work on wait for a worker of this fleet, and are then joined to it. The
worker reads in the state store where one waits, connects to the router that has it, and speaks to the other fleet as
over a connection of its own: messages are passed on as they are, no faster than the receiver reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from api.gate import Application, Gate, Message, Receive, Send, allow, caller_of, refuse
from api.keys_file import KeyFile
from api.peers.connection import PeerConnection, PeerDesk, PeerError
from api.routing.stores import LINE_KEPT_EVERY, ValueStore
from taxiway.contract.peers import LINE, PATH, VERSION, WRONG_FRAME, WRONG_VERSION, PeerServe, WaitingLine
from taxiway.errors import BrokerUnavailableError, TaxiwayError, UnknownObjectError
from taxiway.running import first_of

MOST_WAITING = 64
"""Connections of one peer that wait in one router; the one that has waited longest is closed for a further one."""


class WithPeers:
    """ASGI middleware that serves WebSockets itself, to callers whose key may submit, and passes on everything else."""

    def __init__(self, behind: Application, desk: PeerDesk, keys: KeyFile | None, reached: WaitingLine) -> None:
        self._behind, self.desk = behind, desk
        self._waiting = WaitingLines(desk.router.values, reached)
        self._gate = Gate(self._serve, keys, desk.rates)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request or connection."""
        if scope["type"] == "websocket":
            send = partial(_send_refusal, send)
            token = next((value for name, value in scope["headers"] if name == LINE.encode()), None)
            await (self._gate(scope, receive, send) if token is None else self._join(token, scope, receive, send))
        else:
            await self._behind(scope, receive, send)

    async def _serve(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        caller = caller_of(scope)
        try:
            allow(caller, ("submit",))
            if scope["path"].rstrip("/") != PATH:
                raise UnknownObjectError(f"no WebSocket but {PATH}")
        except TaxiwayError as error:
            await refuse(scope, send, error)
            return
        await receive()  # it connects
        await send({"type": "websocket.accept"})
        hear, say, valid = partial(_message, receive), partial(_send_bytes, send), partial(self._gate.knows, scope)
        connection = PeerConnection(self.desk, caller.tenant, say, valid)
        with contextlib.suppress(OSError):  # it has left
            try:
                first = await connection.first(hear)
                if isinstance(first, PeerServe):
                    await self._waiting.hold(caller.tenant or first.site, first, scope, (receive, send), valid)
                else:
                    await connection.serve(first, hear)
            except PeerError as error:
                await send({"type": "websocket.close", "code": error.code, "reason": error.reason})

    async def _join(self, token: bytes, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Join a worker of this fleet to a connection that waits for work."""
        try:
            with contextlib.suppress(OSError):  # one has left
                await self._waiting.take(token.decode("latin-1"), receive, send)
        except TaxiwayError as error:
            await refuse(scope, send, error)


async def _message(receive: Receive) -> bytes | None:
    """The next message; None once the peer has left."""
    event = await receive()
    return None if event["type"] == "websocket.disconnect" else event.get("bytes") or b""


async def _send_bytes(send: Send, message: bytes) -> None:
    await send({"type": "websocket.send", "bytes": message})


async def _send_refusal(send: Send, message: Message) -> None:
    """Send an answer in place of a connection in the form of ASGI's extension for it; all else as it is."""
    kind = message["type"]
    await send({**message, "type": f"websocket.{kind}"} if kind.startswith("http.") else message)


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
        try:
            await first_of(line.pass_on(ends[0]), self._tell(place, line, valid))
        finally:
            self._lines.pop(token, None)
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
                await line.peer_end(_passed(event))
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
            await self.worker_end(_passed(event))

    async def end(self, other: Send | None) -> None:
        """Close the other connection as one has ended."""
        if not self._ended and other is not None:
            self._ended = True
            with contextlib.suppress(OSError):
                await other({"type": "websocket.close", "code": 1001, "reason": "the other side has left"})


def _passed(event: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "websocket.send", "bytes": event.get("bytes") or b""}


def _address(scope: Mapping[str, Any]) -> str:
    """Where this router was reached, by a proxy or the peer itself."""
    host, port = scope["server"]
    return f"{'https' if scope['scheme'] == 'wss' else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
