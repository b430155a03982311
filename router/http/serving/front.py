"""The infer endpoint, directly below the server; everything else goes to the application.

Litestar's handling of a request (routing, a request object, arguments, a response object) took a third of what an infer
request costs a router, by cProfile over 4,000 of them. Litestar still describes this endpoint, and answers the uncommon
cases: a body without a length, one over the limit, or a caller without permission.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from router.access.keyring import Scope
from router.http.errors import body_of, headers_of, unforeseen
from router.http.gate import Application, Receive, Send, answer, caller_of
from router.http.inference import Answer, Inference
from router.http.serving.connection import WHOLE, Whole
from router.http.traces import answer_header, remember
from taxiway.contract.binary import HEADER
from taxiway.contract.blobs import Buffer
from taxiway.errors import TaxiwayError

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_HEADER = HEADER.encode()
_SUBMIT: Scope = "submit"


class Front:
    """ASGI middleware; `limit` bounds a body, in bytes."""

    def __init__(self, behind: Application, inference: Inference, limit: int) -> None:
        self._behind = behind
        self._inference = inference
        self._limit = limit

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        asked = _INFER.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        headers = dict(scope["headers"]) if asked else {}
        length = headers.get(b"content-length", b"")
        if asked is None or not length.isdigit() or int(length) > self._limit or _SUBMIT not in caller_of(scope).scopes:
            await self._behind(scope, receive, send)
            return
        body = await _body(scope, receive, int(length))
        if body is not None:
            remember(headers)
            got = await self._answer(scope, asked, headers, body)
            await answer(send, got.status, {**got.headers, **answer_header()}, *got.pieces)

    async def _answer(
        self, scope: Mapping[str, Any], asked: re.Match[str], headers: Mapping[bytes, bytes], body: Buffer
    ) -> Answer:
        header_length = headers.get(_HEADER)
        try:
            return await self._inference.answer_to(
                asked[1] if asked[2] is None else f"{asked[1]}:{asked[2]}",
                body,
                caller=caller_of(scope),
                header_length=None if header_length is None else header_length.decode("latin-1"),
                prefer=headers.get(b"prefer", b"").decode("latin-1"),
            )
        except TaxiwayError as error:
            return Answer(error.status, headers_of(error), (body_of(error),))
        except Exception as error:  # unexpected: logged by `unforeseen`
            plain = unforeseen(scope["method"], scope["path"], error)
            return Answer(plain.status, headers_of(plain), (body_of(plain),))


async def _body(scope: Mapping[str, Any], receive: Receive, length: int) -> Buffer | None:
    """The request's body; None if the client disconnected."""
    message = await receive()
    if message["type"] != "http.request":
        return None
    begin: bytes = message["body"]
    if not message["more_body"]:
        return begin
    whole: Whole = scope["extensions"][WHOLE]
    return await whole(begin, length)
