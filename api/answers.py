"""Whole answers as ASGI applications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taxiway.contract.limits import Buffer

JSON: Mapping[str, str] = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer whose body is known, in pieces."""

    status: int
    headers: Mapping[str, str]
    pieces: Sequence[Buffer]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it, with its length."""
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        headers.append((b"content-length", b"%d" % sum(map(len, self.pieces))))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for piece in self.pieces[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": self.pieces[-1] if self.pieces else b""})


def json_whole(body: bytes, headers: Mapping[str, str] = {}) -> HttpAnswer:
    """An answer that is JSON."""
    return HttpAnswer(200, {**JSON, **headers}, (body,))
