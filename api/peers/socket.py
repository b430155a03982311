"""`GET /v2/peers`: the WebSocket of other fleets, beside the HTTP API in its process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from api.gate import Application, Gate, Message, Receive, Send, allow, caller_of, refuse
from api.keys_file import KeyFile
from api.peers.connection import PeerConnection, PeerDesk, PeerError
from api.peers.waiting import WaitingLines
from taxiway.contract.peers import LINE, PATH, PeerServe, WaitingLine
from taxiway.errors import TaxiwayError, UnknownObjectError


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
