"""Where requests go in and answers come out: one `Door` a kind of address, whose file alone knows its library."""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from taxiway.client.tensors import Show
from taxiway.contract.durability import Durability
from taxiway.contract.job import JobStatus, Result
from taxiway.contract.listing import JobFilter, JobPage
from taxiway.contract.request import Request
from taxiway.contract.streaming import Told
from taxiway.errors import InvalidRequestError

_DOORS = {
    "redis": "taxiway.client.valkey_door",
    "rediss": "taxiway.client.valkey_door",
    "unix": "taxiway.client.valkey_door",
    "http": "taxiway.client.http_door",
    "https": "taxiway.client.http_door",
}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a door remembers of a job.

    `reply` gets the stored result as soon as it is announced, where the door was told to listen for it; `single` says
    that the request came without a batch axis, None where that is not known. A job that was `submitted` by this client
    exists though no router may have seen it yet; any other id may be nobody's. `agreed` gets what a router says of a
    request under an idempotency key: whether the job is the one that was asked for.
    """

    job: str
    reply: asyncio.Future[bytes] | None = None
    single: bool | None = None
    submitted: bool = False
    agreed: asyncio.Future[bytes] | None = None


class Door(Protocol):
    """One way into a fleet. Every call fails with `BrokerUnavailableError` when nobody answers within its patience."""

    async def submit(self, request: Request) -> Receipt:
        """Accept the request durably."""

    async def infer(self, request: Request, timeout: float | None) -> Result:
        """Submit and wait for the answer; raises what `result` raises."""

    async def result(self, receipt: Receipt, timeout: float | None) -> Result:
        """The job's answer.

        Raises:
            TaxiwayError: the error that the job ended with, of its own class.
            ResultTimeoutError: `timeout` seconds passed.
        """

    def stream(self, receipt: Receipt, timeout: float | None) -> Told:
        """What is told of the job's answer as it comes, and the answer at last; raises what `result` raises."""

    async def status(self, receipt: Receipt) -> JobStatus:
        """Where the job is. This, `placement`, `cancel` and `result` raise `UnknownJobError` for an id of no job."""

    async def placement(self, receipt: Receipt) -> dict[str, Any]:
        """Why the job is where it is: `reason` and the figures it was decided from."""

    async def what_if(self, request: Request) -> dict[str, Any]:
        """Where the request would run now and why, without submitting it."""

    async def cancel(self, receipt: Receipt) -> None:
        """Ask that the job does not run."""

    async def jobs(self, wanted: JobFilter, limit: int, cursor: str) -> JobPage:
        """A page of the jobs that pass `wanted`, the latest first."""

    async def models(self) -> list[dict[str, Any]]:
        """What the fleet can run."""

    async def fleet(self) -> dict[str, Any]:
        """The fleet's classes and devices now."""

    async def administer(self, verb: str, path: str) -> dict[str, Any]:
        """A router's answer to an operator: an HTTP method and a path of its door."""

    async def close(self) -> None:
        """Let go of all connections."""


def open_door(
    url: str, *, patience: float, show: Show, key: str | None = None, durability: Durability = "written"
) -> Door:
    """The door at `url`; it connects when it is first used, and tries for `patience` seconds whenever nobody answers.

    `show` turns a result's tensors into what the caller sees; `key` is the caller's at the HTTP door, and at a broker
    signs; `durability` is what a submit waits for, at a broker.

    Raises:
        InvalidRequestError: no such kind of address, no such key, or one that takes no durability.
    """
    scheme = urlsplit(url).scheme
    if scheme not in _DOORS:
        expected, got = "://, ".join(_DOORS), f"{scheme}://…" if scheme else "another text"  # never a password
        raise InvalidRequestError(f"url: expected an address that starts with {expected}://, got {got}", field="url")
    opened: Door = importlib.import_module(_DOORS[scheme]).open_url(url, patience, show, key, durability)
    return opened
