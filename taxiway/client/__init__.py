"""The Python client. A transport does the I/O for one kind of address; the client classes are the public API over it.

`asyncio_client` holds the one implementation; `sync_client` runs it on a background thread. Each kind of address has
one module with its transport, which alone imports its library; both have the same methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote, urlsplit

from taxiway.contract.tensors import Show
from taxiway.errors import invalid

if TYPE_CHECKING:
    from taxiway.client.http_transport import HttpClientTransport
    from taxiway.client.valkey_results import Reply
    from taxiway.client.valkey_transport import ValkeyClientTransport

_ROUTERS = ("http", "https")

ClientTransport: TypeAlias = "ValkeyClientTransport | HttpClientTransport"
"""A transport to a fleet. A call without an answer raises `BrokerUnavailableError` after `connect_timeout` s."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a transport keeps for a job.

    `reply` has the stored result when it is announced, if the transport listens for it. `single` means that the
    request came without a batch axis; None if unknown. A job `submitted` by this client exists even if no router has
    recorded it yet; any other id may be unknown.
    """

    job: str
    reply: Reply | None = None
    single: bool | None = None
    submitted: bool = False


def open_transport(
    url: str, *, connect_timeout: float, show: Show, key: str | None = None, confirmed_by: int = 0
) -> ClientTransport:
    """The transport at `url`. It connects on first use, and retries for `connect_timeout` seconds without an answer.

    `show` converts a result's tensors for the caller. `key` is the API key at the HTTP API, the signing key at a
    broker. A submit to a broker waits until so many replicas have confirmed it.

    Raises:
        InvalidRequestError: unsupported address, malformed key, or a durability given for a router.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # its text may have a password
        raise invalid("url", "an IPv6 address between [ and ], or no such brackets", "another text") from None
    if scheme in _ROUTERS:
        from taxiway.client.http_transport import HttpClientTransport  # imported only where it is used, with aiohttp

        return HttpClientTransport(url, connect_timeout, show, key, confirmed_by)
    from taxiway.valkey import SCHEMES  # the same

    if scheme in SCHEMES:
        from taxiway.client.valkey_transport import ValkeyClientTransport

        return ValkeyClientTransport(url, connect_timeout, show, key, confirmed_by)
    expected, got = "://, ".join((*SCHEMES, *_ROUTERS)), f"{scheme}://…" if scheme else "no scheme"  # never a password
    raise invalid("url", f"an address that starts with {expected}://", got)


class DeadLetters:
    """The fleet's dead letters. A call raises `UnknownLetterError` for an unknown id."""

    def __init__(self, transport: ClientTransport) -> None:
        self._transport = transport

    async def list(self, most: int) -> list[dict[str, Any]]:
        """The most recent first: id, reason, time, reporter, job, and the workers that died holding it."""
        found: list[dict[str, Any]] = (await self._transport.administer("GET", f"/v2/dead?most={most}"))["letters"]
        return found

    async def show(self, id: str) -> dict[str, Any]:
        """One of them with its message."""
        return await self._transport.administer("GET", _path(id))

    async def replay(self, id: str) -> str:
        """Run its job again from the beginning. Returns the job's id, which does not change."""
        return str((await self._transport.administer("POST", f"{_path(id)}/replay"))["job"])

    async def drop(self, id: str) -> None:
        """Forget one of them."""
        await self._transport.administer("DELETE", _path(id))


def _path(id: str) -> str:
    return f"/v2/dead/{quote(id, safe='')}"
