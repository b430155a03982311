"""The Python client. A transport does the I/O for one kind of address; the client classes are the public API over it.

`asyncio_client` holds the one implementation; `sync_client` runs it on a background thread. Here is what a transport
offers. Each kind of address has one module, which alone imports its library.
"""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from taxiway.contract.job import JobStatus, Result
from taxiway.contract.request import Request
from taxiway.contract.stream import EventStream
from taxiway.contract.tensors import Show
from taxiway.errors import invalid
from taxiway.listing import JobFilter, JobPage

_TRANSPORTS = {
    "redis": "taxiway.client.valkey_transport",
    "rediss": "taxiway.client.valkey_transport",
    "unix": "taxiway.client.valkey_transport",
    "redis+sentinel": "taxiway.client.valkey_transport",
    "rediss+sentinel": "taxiway.client.valkey_transport",
    "http": "taxiway.client.http_transport",
    "https": "taxiway.client.http_transport",
}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a transport keeps for a job.

    `reply` resolves to the stored result when it is announced, if the transport listens for it. `single` means that the
    request came without a batch axis; None if unknown. A job `submitted` by this client exists even if no router has
    recorded it yet; any other id may be unknown.
    """

    job: str
    reply: asyncio.Future[bytes] | None = None
    single: bool | None = None
    submitted: bool = False


class ClientTransport(Protocol):
    """A transport to a fleet. A call without an answer raises `BrokerUnavailableError` after `connect_timeout` s."""

    async def submit(self, request: Request) -> Receipt:
        """Accept the request durably."""

    async def infer(self, request: Request, timeout: float | None) -> Result:
        """Submit and wait for the answer; raises what `result` raises."""

    async def result(self, receipt: Receipt, timeout: float | None) -> Result:
        """The job's answer.

        Raises:
            TaxiwayError: the error that the job ended with, in its own class.
            ResultTimeoutError: `timeout` seconds passed.
        """

    def stream(self, receipt: Receipt, timeout: float | None) -> EventStream:
        """The events of the job's answer as it is generated, then the result; raises what `result` raises."""

    async def status(self, receipt: Receipt) -> JobStatus:
        """The job's state. This, `placement`, `cancel` and `result` raise `UnknownJobError` for an unknown id."""

    async def placement(self, receipt: Receipt) -> dict[str, Any]:
        """Why the job was placed where it is: `reason` and the figures behind the decision."""

    async def what_if(self, request: Request) -> dict[str, Any]:
        """Where the request would run now and why, without submitting it."""

    async def cancel(self, receipt: Receipt) -> None:
        """Request cancellation of the job."""

    async def jobs(self, wanted: JobFilter, limit: int, cursor: str) -> JobPage:
        """A page of the jobs that match `wanted`, most recent first."""

    async def models(self) -> list[dict[str, Any]]:
        """What the fleet can run."""

    async def fleet(self) -> dict[str, Any]:
        """The fleet's classes and devices now."""

    async def administer(self, verb: str, path: str) -> dict[str, Any]:
        """A router's answer to an operator's call: HTTP method and path."""

    async def close(self) -> None:
        """Close all connections."""


def open_transport(
    url: str, *, connect_timeout: float, show: Show, key: str | None = None, confirmed_by: int = 0
) -> ClientTransport:
    """The transport at `url`. It connects on first use, and retries for `connect_timeout` seconds without an answer.

    `show` converts a result's tensors for the caller. `key` is the API key at the HTTP API, the signing key at a
    broker. A submit to a broker waits until so many replicas have confirmed it.

    Raises:
        InvalidRequestError: unsupported address, malformed key, or a durability given for a router.
    """
    scheme = urlsplit(url).scheme
    if scheme not in _TRANSPORTS:
        expected, got = "://, ".join(_TRANSPORTS), f"{scheme}://…" if scheme else "no scheme"  # never a password
        raise invalid("url", f"an address that starts with {expected}://", got)
    opened: ClientTransport = importlib.import_module(_TRANSPORTS[scheme]).open_url(
        url, connect_timeout, show, key, confirmed_by
    )
    return opened


class DeadLetters:
    """The fleet's dead letters. A call raises `UnknownLetterError` for an unknown letter id."""

    def __init__(self, transport: ClientTransport) -> None:
        self._transport = transport

    async def list(self, most: int) -> list[dict[str, Any]]:
        """Letters, most recent first: id, reason, time, reporter, job, and the workers that died holding it."""
        letters: list[dict[str, Any]] = (await self._transport.administer("GET", f"/v2/dead?most={most}"))["letters"]
        return letters

    async def show(self, letter: str) -> dict[str, Any]:
        """One letter with its message."""
        return await self._transport.administer("GET", _path(letter))

    async def replay(self, letter: str) -> str:
        """Run the letter's job again from the beginning. Returns the job's id, which does not change."""
        return str((await self._transport.administer("POST", f"{_path(letter)}/replay"))["job"])

    async def drop(self, letter: str) -> None:
        """Forget a letter."""
        await self._transport.administer("DELETE", _path(letter))


def _path(letter: str) -> str:
    return f"/v2/dead/{quote(letter, safe='')}"
