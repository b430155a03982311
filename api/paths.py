"""Names with slashes in paths, such as `/v2/models/meta-llama%2FLlama-3.1-8B/infer`: an escaped slash divides nothing.

The server gives the application an unescaped path. Here slashes in it are escaped again until the endpoint is found.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from litestar.middleware import MiddlewareProtocol
from litestar.types import ASGIApp

from api.gate import Application, Receive, Send

_SLASH = "%2F"


def divided(raw: bytes) -> str:
    """The path with everything unescaped but slashes."""
    return "/".join(unquote(part).replace("/", _SLASH) for part in raw.decode("latin-1").split("/"))


def name_in(segment: str) -> str:
    """The name that a segment of a divided path is."""
    return segment.replace(_SLASH, "/")


class Divided:
    """ASGI middleware before the endpoint is found."""

    def __init__(self, behind: Application) -> None:
        self._behind = behind

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        raw: bytes = scope.get("raw_path") or b""
        if b"%2F" in raw or b"%2f" in raw:
            scope["path"] = divided(raw)
        await self._behind(scope, receive, send)


class Named(MiddlewareProtocol):
    """Middleware after the endpoint was found: its parameters are names."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if _SLASH in scope["path"]:
            found = scope["path_params"].items()
            scope["path_params"] = {key: name_in(text) if isinstance(text, str) else text for key, text in found}
        await self.app(scope, receive, send)
