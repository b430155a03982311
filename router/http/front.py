"""Infer requests, straight below the server; everything else is the application's.

Litestar's own way through a request (routing, a request object, arguments, a response object) took a third of what an
infer request costs a router, by cProfile over 4,000 of them. It describes this endpoint all the same, and answers what
does not come plainly: a body without a length, or over the limit.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from router.http.errors import body_of, headers_of, unforeseen
from router.http.inference import Answer, Inference
from taxiway.binary import HEADER
from taxiway.errors import TaxiwayError

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_HEADER = HEADER.encode()


class Front:
    """An ASGI application before another one; `limit` bounds a body, in bytes."""

    def __init__(self, behind: Application, inference: Inference, limit: int) -> None:
        self._behind = behind
        self._inference = inference
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        asked = _INFER.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        headers = dict(scope["headers"]) if asked else {}
        length = headers.get(b"content-length", b"")
        if asked is None or not length.isdigit() or int(length) > self._limit:
            await self._behind(scope, receive, send)
            return
        body = await _body(receive)
        if body is not None:
            answer = await self._answer(scope, asked, headers, body)
            await _send(answer, send)

    async def _answer(self, scope: Scope, asked: re.Match[str], headers: Mapping[bytes, bytes], body: bytes) -> Answer:
        header_length = headers.get(_HEADER)
        try:
            return await self._inference.answer_to(
                asked[1] if asked[2] is None else f"{asked[1]}:{asked[2]}",
                body,
                header_length=None if header_length is None else header_length.decode("latin-1"),
                prefer=headers.get(b"prefer", b"").decode("latin-1"),
            )
        except TaxiwayError as error:
            return Answer(error.status, headers_of(error), body_of(error))
        except Exception as error:  # nobody foresaw it: the log says what it is
            told = unforeseen(scope["method"], scope["path"], error)
            return Answer(told.status, headers_of(told), body_of(told))


async def _body(receive: Receive) -> bytes | None:
    """The request's body; None where its sender is gone."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _send(answer: Answer, send: Send) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers.items()]
    headers.append((b"content-length", str(len(answer.content)).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.content})
