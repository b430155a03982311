"""Who may pass: callers are known by their keys before anything of a request but its head is read.

A door without keys lets everybody in, and `__main__` binds it to the loopback. Every endpoint that does not say
otherwise needs the scope `admin`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from router.access.file import KeyFile
from router.access.keyring import ANYBODY, NOBODY, Caller, Scope
from router.access.rates import Rates
from router.http.errors import body_of, headers_of
from taxiway.contract.blobs import Buffer
from taxiway.contract.quoting import quoted
from taxiway.errors import ForbiddenError, RateLimitedError, TaxiwayError, UnauthenticatedError

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

OPEN = frozenset({"/v2/health/live", "/v2/health/ready", "/", "/docs"})
"""Paths that need no key: what starts, watches and balances routers asks them, and who looks with a browser."""

_OWN_SITE = (b"same-origin", b"none")
"""What `Sec-Fetch-Site` says of the router's own pages, and of what a person typed."""

_HOST = re.compile(rb"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9.-]{1,253}))(?::[0-9]{0,5})?")
_CALLER = "taxiway.caller"
_NEEDS = "needs"
_BEARER = b"bearer "


def needs(*scopes: Scope) -> dict[str, Any]:
    """What an endpoint says of who may use it: who has one of `scopes`; without any, whoever the gate lets through."""
    return {_NEEDS: scopes}


class Gate:
    """An ASGI application before another one, which finds the caller in the request's scope (`caller_of`)."""

    def __init__(self, behind: Application, keys: KeyFile | None, rates: Rates) -> None:
        self._behind = behind
        self._keys = keys
        self._rates = rates

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            scope[_CALLER] = _here(scope) if self._keys is None else self._known(scope, self._keys)
        except TaxiwayError as error:
            await answer(send, error.status, headers_of(error), body_of(error))
        else:
            await self._behind(scope, receive, send)

    def _known(self, scope: Mapping[str, Any], keys: KeyFile) -> Caller:
        """Whose key came with the request; nobody's where none is needed.

        Raises:
            UnauthenticatedError: no good key came.
            RateLimitedError: its tenant asks too often.
        """
        if scope["path"] in OPEN:
            return NOBODY
        caller = keys.caller(_secret(scope["headers"]))
        if caller is None:
            raise UnauthenticatedError("authorization: expected `Bearer` and a key that this door knows and is in time")
        wait = self._rates.wait(caller.tenant or "", time.monotonic())
        if wait > 0:
            limit = self._rates.limit(caller.tenant or "")
            message = (
                f"rate limit exceeded: tenant {caller.tenant!r} may make {limit:g} requests/s (requests_per_second)"
            )
            raise RateLimitedError(message, tenant=caller.tenant, retry_after=wait)
        return caller


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Who makes the request."""
    caller: Caller = scope[_CALLER]
    return caller


def allow(caller: Caller, scopes: tuple[Scope, ...]) -> None:
    """Let a caller by who has one of `scopes`.

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
    """Put the caller's tenant into a request's parameters.

    Raises:
        ForbiddenError: they name another one.
    """
    if caller.tenant is None:
        return
    if parameters.setdefault("tenant", caller.tenant) not in (caller.tenant, None):
        raise ForbiddenError(f"tenant: this key is for the tenant {caller.tenant!r}", field="tenant")
    parameters["tenant"] = caller.tenant


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


async def answer(send: Send, status: int, headers: Mapping[str, str], *pieces: Buffer) -> None:
    """Answer a request with a whole body in pieces; its length is added to `headers`."""
    told = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    told.append((b"content-length", b"%d" % sum(map(len, pieces))))
    await send({"type": "http.response.start", "status": status, "headers": told})
    for piece in pieces[:-1]:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": pieces[-1] if pieces else b""})


def _here(scope: Mapping[str, Any]) -> Caller:
    """Who asks at a door without keys: anybody on this machine, but no page in a browser there.

    A page of another site can make a browser send requests here, and one whose name was made to mean 127.0.0.1 can read
    the answers (DNS rebinding): its name stands in `Host`.

    Raises:
        ForbiddenError: a page asks, or somebody by another name than this machine's own.
    """
    for name, value in scope["headers"]:
        if name == b"origin" or (name == b"sec-fetch-site" and value not in _OWN_SITE):
            message = f"{name.decode()}: a page of another site may not ask a router that has no keys"
            raise ForbiddenError(message, header=name.decode())
        if name == b"host" and not _is_own(value):
            message = f"host: expected localhost, 127.0.0.1 or [::1] at a router that has no keys, got {quoted(value)}"
            raise ForbiddenError(f"{message}; ask it by such a name, or start it with --keys", header="host")
    return ANYBODY


def _is_own(host: bytes) -> bool:
    """Whether a `Host` header names this machine's loopback, at any port."""
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback((found["v6"] or found["name"]).decode().lower())


def _secret(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The key in a request's head; empty where there is none."""
    for name, value in headers:
        if name == b"authorization":
            return value[len(_BEARER) :].strip() if value[: len(_BEARER)].lower() == _BEARER else b""
    return b""
