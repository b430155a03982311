"""`GET /v2/peers`: the WebSocket of other fleets, beside the HTTP API in its process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from api.gate import Application, Gate, Message, Receive, Send, allow, caller_of, refuse
from api.keys_file import KeyFile
from api.peers.connection import PeerConnection, PeerDesk, PeerError
from taxiway.contract.peers import PATH
from taxiway.errors import TaxiwayError, UnknownObjectError


class WithPeers:
    """ASGI middleware that serves WebSockets itself, to callers whose key may submit, and passes on everything else."""

    def __init__(self, behind: Application, desk: PeerDesk, keys: KeyFile | None) -> None:
        self._behind, self._desk = behind, desk
        self._gate = Gate(self._serve, keys, desk.rates)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request or connection."""
        if scope["type"] == "websocket":
            await self._gate(scope, receive, partial(_send_refusal, send))
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
        say = partial(_send_bytes, send)
        connection = PeerConnection(self._desk, caller.tenant, say, partial(self._gate.knows, scope))
        with contextlib.suppress(OSError):  # it has left
            try:
                await connection.serve(partial(_message, receive))
            except PeerError as error:
                await send({"type": "websocket.close", "code": error.code, "reason": error.reason})


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
