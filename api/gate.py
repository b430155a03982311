"""Authentication: callers are identified by key from the request head, before anything else is read.

An API without keys admits every caller, and `__main__` binds it to the loopback. Every endpoint needs the scope `admin`
unless it declares otherwise.

Names in paths may have slashes, such as `/v2/models/meta-llama%2FLlama-3.1-8B/infer`: an escaped slash divides nothing.
The server gives the application an unescaped path. Slashes in it are escaped again until the endpoint is found.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any
from urllib.parse import unquote

import msgspec
from litestar import MediaType, Request, Response
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.middleware import MiddlewareProtocol
from litestar.types import ASGIApp

from api.access import TRUSTED, UNAUTHENTICATED, Caller, Scope, TenantRates
from api.errors import error_answer
from api.keys_file import KeyFile
from api.openai_errors import is_path as is_openai
from api.terms import add_terms
from taxiway.client.http_link import is_loopback
from taxiway.errors import ForbiddenError, RateLimitedError, TaxiwayError, UnauthenticatedError, quoted

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]
AnyRequest = Request[Any, Any, Any]

OPEN = frozenset({"/v2/health/live", "/v2/health/ready", "/", "/docs"})
"""Paths that need no key: for process managers, health checks, load balancers and browsers."""

PAGE_FILES = "/page/"
"""The path before the names of the pages' files, which need no key either."""

_OWN_SITE = (b"same-origin", b"none")
"""Values of `Sec-Fetch-Site` for the router's own pages, and for a typed address."""

_HOST = re.compile(rb"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9.-]{1,253}))(?::[0-9]{0,5})?")
_CALLER = "taxiway.caller"
_NEEDS = "needs"
_BEARER = b"bearer "
_encode = msgspec.json.Encoder().encode


def needs(*scopes: Scope) -> dict[str, Any]:
    """An endpoint's declaration of who may use it: callers with one of `scopes`, or if empty all that are admitted."""
    return {_NEEDS: scopes}


class Gate:
    """ASGI middleware that identifies the caller and stores it in the request's scope (`caller_of`).

    The path in the scope has its slashes escaped again from here on.
    """

    def __init__(self, behind: Application, keys: KeyFile | None, rates: TenantRates) -> None:
        self._behind = behind
        self._keys = keys
        self._rates = rates

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        raw: bytes = scope.get("raw_path") or b""
        if b"%2F" in raw or b"%2f" in raw:
            scope["path"] = divided(raw)
        if self._keys is not None and is_openai(scope["path"]):
            send = partial(self._send_with_rate, scope, send)
        try:
            scope[_CALLER] = _here(scope) if self._keys is None else self._known(scope, self._keys)
        except TaxiwayError as error:
            await refuse(scope, send, error)
        else:
            await self._behind(scope, receive, send)

    def knows(self, scope: Mapping[str, Any]) -> bool:
        """Whether the key of a request that was admitted is valid still."""
        return self._keys is None or self._keys.caller(_secret(scope["headers"])) is not None

    def _known(self, scope: dict[str, Any], keys: KeyFile) -> Caller:
        """The caller whose key came with the request; `UNAUTHENTICATED` if none is needed.

        Raises:
            UnauthenticatedError: no valid key.
            RateLimitedError: the tenant exceeds its rate limit.
        """
        if scope["path"] in OPEN or scope["path"].startswith(PAGE_FILES):
            return UNAUTHENTICATED
        caller = keys.caller(_secret(scope["headers"]))
        if caller is None:
            raise UnauthenticatedError("authorization: expected `Bearer` and a known key that has not expired")
        scope[_CALLER] = caller
        wait = self._rates.wait(caller.tenant or "", time.monotonic())
        if wait > 0:
            limit = self._rates.limit(caller.tenant or "")
            message = (
                f"rate limit exceeded: tenant {caller.tenant!r} may make {limit:g} requests/s (requests_per_second)"
            )
            raise RateLimitedError(message, tenant=caller.tenant, retry_after=wait)
        return caller

    async def _send_with_rate(self, scope: Mapping[str, Any], send: Send, message: Message) -> None:
        """Send part of an answer, with OpenAI's rate limit headers at its start if the tenant is known."""
        if message["type"] == "http.response.start" and _CALLER in scope:
            limit, left, full_in = self._rates.left(caller_of(scope).tenant or "", time.monotonic())
            figures = {"limit": f"{limit}", "remaining": f"{left}", "reset": f"{full_in:.3f}s"}
            headers = [(f"x-ratelimit-{name}-requests".encode(), text.encode()) for name, text in figures.items()]
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """The caller of the request."""
    caller: Caller = scope[_CALLER]
    return caller


def allow(caller: Caller, scopes: tuple[Scope, ...]) -> None:
    """Check that a caller has one of `scopes`.

    Raises:
        ForbiddenError: it has none of them.
    """
    if caller.scopes.isdisjoint(scopes):
        raise ForbiddenError(f"this key lacks the scope {' or '.join(scopes)}", scope=list(scopes))


def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar's guard of every endpoint. Raises as `allow` does."""
    scopes = handler.opt.get(_NEEDS, ("admin",))
    if scopes:
        allow(caller_of(connection.scope), scopes)


def claim(caller: Caller, parameters: dict[str, Any]) -> None:
    """Set the caller's tenant in a request's parameters.

    Raises:
        ForbiddenError: they name another tenant.
    """
    if caller.tenant is None:
        return
    if parameters.setdefault("tenant", caller.tenant) not in (caller.tenant, None):
        raise ForbiddenError(f"tenant: this key is for the tenant {caller.tenant!r}", field="tenant")
    parameters["tenant"] = caller.tenant


def take_terms(scope: Mapping[str, Any], parameters: dict[str, Any], refused: Mapping[str, str] = {}) -> None:
    """Complete the terms of a request for a job, which its body has among `parameters`: by its headers and caller.

    Raises:
        ForbiddenError, InvalidRequestError: as `claim` and `add_terms` raise them.
    """
    add_terms(scope["headers"], parameters, refused)
    claim(caller_of(scope), parameters)


async def refuse(scope: Mapping[str, Any], send: Send, error: TaxiwayError, more: Mapping[str, str] = {}) -> None:
    """Answer a request with an error, and `more` headers."""
    answered = error_answer(error, scope["path"])
    await replace(answered, headers={**answered.headers, **more})(scope, None, send)


def json_answer(content: Any, headers: Mapping[str, str] = {}, *, status: int | None = None) -> Response[bytes]:
    """The answer of an endpoint that has JSON; `status` is the endpoint's own unless given."""
    return Response(_encode(content), status_code=status, media_type=MediaType.JSON, headers=headers)


def _here(scope: Mapping[str, Any]) -> Caller:
    """The caller at an API without keys: any program on this machine, but no web page in a browser there.

    A page of another site can make a browser send requests here, and a page whose name resolves to 127.0.0.1 can read
    the answers (DNS rebinding): its name is in `Host`.

    Raises:
        ForbiddenError: the request comes from a web page, or names a host other than the loopback.
    """
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    for name, value in scope["headers"]:
        other = name == b"origin" and value not in (b"http://" + host, b"https://" + host)
        if other or (name == b"sec-fetch-site" and value not in _OWN_SITE):
            message = f"{name.decode()}: cross-site requests are refused by a router without keys"
            raise ForbiddenError(message, header=name.decode())
        if name == b"host" and not _is_own(value):
            got = quoted(value.decode("latin-1"))
            message = f"host: expected localhost, 127.0.0.1 or [::1] at a router without keys, got {got}"
            raise ForbiddenError(f"{message}; use such a name, or start the router with --keys", header="host")
    return TRUSTED


@lru_cache(maxsize=64)
def _is_own(host: bytes) -> bool:
    """Whether a `Host` header names this machine's loopback, at any port."""
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback((found["v6"] or found["name"]).decode().lower())


def _secret(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The key in a request's head; empty if there is none."""
    for name, value in headers:
        if name == b"authorization":
            return value[len(_BEARER) :].strip() if value[: len(_BEARER)].lower() == _BEARER else b""
    return b""


_SLASH = "%2F"


def divided(raw: bytes) -> str:
    """The path with everything unescaped but slashes."""
    return "/".join(unquote(part).replace("/", _SLASH) for part in raw.decode("latin-1").split("/"))


def name_in(segment: str) -> str:
    """The name that a segment of a divided path is."""
    return segment.replace(_SLASH, "/")


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
