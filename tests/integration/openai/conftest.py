"""A fleet for OpenAI's clients that the tests of a module share, and their calls."""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import httpx
import openai
import pytest

from tests.openai_fleet import Caller, OpenAIFleet, openai_fleet, sdk


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


@pytest.fixture
def call(client: openai.OpenAI) -> Caller:
    """Calls a method of the SDK by its dotted name; what it streams or lists comes as a list."""

    def asked(name: str, *names: str, **fields: Any) -> Any:
        found = reduce(getattr, name.split("."), client)(*names, **fields)  # type: ignore[operator]  # a method
        return list(found) if isinstance(found, openai.Stream) or name.endswith("list") else found

    return asked
