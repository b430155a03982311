"""Who may pass: callers are known by their keys before anything of a request but its head is read.

A door without keys lets everybody in, and `__main__` binds it to the loopback. Every endpoint that does not say
otherwise needs the scope `admin`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from router.access.file import KeyFile
from router.access.keyring import ANYBODY, NOBODY, Caller, Scope
from router.access.rates import Rates
from router.http.errors import body_of, headers_of
from taxiway.blobs import Buffer
from taxiway.errors import ForbiddenError, RateLimitedError, TaxiwayError, UnauthenticatedError

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

OPEN = frozenset({"/v2/health/live", "/v2/health/ready"})
"""Paths that need no key: what starts, watches and balances routers asks them."""

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
            message = f"the tenant {caller.tenant!r} makes more requests a second than it may (requests_per_second)"
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

    Raises:
        ForbiddenError: a page asks.
    """
    for name, _ in scope["headers"]:
        if name == b"origin":
            raise ForbiddenError("a web page (origin) may not ask a router that has no keys")
    return ANYBODY


def _secret(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The key in a request's head; empty where there is none."""
    for name, value in headers:
        if name == b"authorization":
            return value[len(_BEARER) :].strip() if value[: len(_BEARER)].lower() == _BEARER else b""
    return b""
