"""When an endpoint's probes take it out of service, and bring it back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from tasks.endpoints import Endpoint, Health
from workers.endpoints import openai
from workers.endpoints.health import EndpointHealth
from workers.endpoints.http import EndpointLink
from workers.endpoints.protocol import EndpointError, FaultKind

FAILED = EndpointError(FaultKind.UNREACHED, "no answer")
LOADING = EndpointError(FaultKind.STARTING, "the endpoint is starting")

Outcome = bool | EndpointError


class Link:
    """A connection whose probes have these outcomes: whether each is answered, or how it failed."""

    root, url = "http://engine", "http://engine/v1"
    heard = 0.0

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes: Iterator[Outcome] = iter(outcomes)
        self.over = asyncio.Event()

    async def probe(self, path: str, timeout: float, method: str = "GET", *, base: str = "") -> bytes:
        """The outcome; after the last one, nothing is answered."""
        if base == self.root:  # the engine has no figures
            raise FAILED
        answered = next(self._outcomes, None)
        if answered is None:
            self.over.set()
            await asyncio.Event().wait()
        if isinstance(answered, EndpointError):
            raise answered
        if not answered:
            raise FAILED
        return b'{"data": []}'


async def _state_after(outcomes: Sequence[Outcome]) -> str:
    link = Link(outcomes)
    endpoint = Endpoint(protocol="openai", url="http://engine/v1", slots=1, health=Health(every=0.01))
    health = EndpointHealth(cast("EndpointLink", link), openai, endpoint, lambda: None, lambda _: None)
    probing = asyncio.create_task(health.run())
    async with asyncio.timeout(10):
        await link.over.wait()
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    return health.state


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([True], "closed"),
        ([False], "open"),
        ([True, False, True], "closed"),
        ([True, False, True, False], "closed"),
        ([True, False, False], "open"),
        ([True, False, False, True], "half-open"),
        ([True, LOADING], "open"),
        ([LOADING, True], "half-open"),
    ],
)
def test_two_missed_probes_in_a_row_open_the_breaker_and_one_that_says_starting(
    outcomes: Sequence[Outcome], state: str
) -> None:
    assert asyncio.run(_state_after(outcomes)) == state
