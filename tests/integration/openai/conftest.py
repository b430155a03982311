"""A fleet for OpenAI's clients that the tests of a module share, and their calls by both kinds of client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import httpx
import openai
import pytest

from tests.openai_fleet import OpenAIFleet, openai_fleet, sdk


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIFleet]:
    with openai_fleet(tmp_path_factory.mktemp("openai")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def client(fleet: OpenAIFleet) -> Iterator[openai.OpenAI]:
    with sdk(fleet.url) as client:
        yield client


@pytest.fixture(scope="module")
def http(fleet: OpenAIFleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.router.http, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, fleet: OpenAIFleet, client: openai.OpenAI) -> Callable[..., Any]:
    """Calls a method of the SDK by its dotted name; what it streams or lists comes as a list."""

    def synchronous(name: str, *names: str, **fields: Any) -> Any:
        found = _method(client, name)(*names, **fields)
        return list(found) if isinstance(found, openai.Stream) or name.endswith("list") else found

    async def asynchronous(name: str, names: tuple[str, ...], fields: dict[str, Any]) -> Any:
        async with openai.AsyncOpenAI(base_url=fleet.url, api_key="none", max_retries=0, timeout=30) as client:
            found = _method(client, name)(*names, **fields)
            found = found if name.endswith("list") else await found
            listed = isinstance(found, openai.AsyncStream) or name.endswith("list")
            return [one async for one in found] if listed else found

    if request.param == "sync":
        return synchronous
    return lambda name, *names, **fields: asyncio.run(asynchronous(name, names, fields))


def _method(client: Any, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = reduce(getattr, name.split("."), client)
    return found
