"""A small fleet's worker on a real Valkey, the smallest router before it, and a producer with nothing but Celery."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis
from celery import Celery

import taxiway
from tasks.settings import Settings
from taxiway.contract.keys import priority_lists
from tests.producing import producing
from tests.routing import EchoFleet, echo_fleet, eventually
from tests.scripting import Store
from tests.working import Site, Tower, WorkerProcess, empty_fleet, open_site, worker_process, worker_settings

HERE = Path(__file__).parent


_TESTS_OF = {
    "fastapi": "client/test_web_frameworks.py",
    "openai": "openai/test_*.py",
    "standardwebhooks": "openai/test_webhooks.py",
    "tritonclient": "api/test_triton_*.py",
}

collect_ignore = [
    str(path) for sdk, tests in _TESTS_OF.items() if not importlib.util.find_spec(sdk) for path in HERE.glob(tests)
]
"""Tests of stock clients, in an environment that was made before they were development dependencies."""


@pytest.fixture(scope="module")
def lasting(valkey_url: str) -> Settings:
    """As `settings`, of a fleet that lives through the tests of a module."""
    return empty_fleet(valkey_url, lasting=True)


@pytest.fixture(scope="module")
def echo(lasting: Settings) -> Iterator[EchoFleet]:
    """A router before one device, for tests that leave both as they are."""
    with echo_fleet(lasting) as fleet:
        yield fleet


@pytest.fixture
def paused(echo: EchoFleet, state: redis.Redis) -> Iterator[None]:
    """The device of `echo` answers nothing in this test: what is placed waits, and nothing else does."""
    eventually(lambda: not any(map(state.llen, priority_lists(echo.device.hardware_class))))
    with echo.device.pause():
        yield


@pytest.fixture(scope="module")
def http(echo: EchoFleet) -> httpx.Client:
    """The HTTP API of `echo`."""
    return echo.http


@pytest.fixture(scope="module")
def interfaces(echo: EchoFleet) -> dict[str, str]:
    """The addresses at which our clients ask the fleet of a module: `echo`, where the module has none of its own."""
    return echo.interfaces


@pytest.fixture(params=["broker", "http"])
def client(request: pytest.FixtureRequest, interfaces: dict[str, str]) -> Iterator[taxiway.Client]:
    """A client of each interface."""
    with taxiway.Client(interfaces[request.param]) as client:
        yield client


@pytest.fixture
def state(lasting: Settings) -> Iterator[redis.Redis]:
    """What `lasting` keeps."""
    with redis.Redis.from_url(lasting.broker) as client:
        yield client


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    return worker_settings(settings, tmp_path)


@pytest.fixture
def worker(fleet: Settings) -> Iterator[WorkerProcess]:
    with worker_process(fleet) as process:
        yield process


@pytest.fixture
def store(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.broker) as client:
        yield client


@pytest.fixture
def scripts(store: redis.Redis) -> Store:
    """The scripts that run in the store."""
    return Store(store)


@pytest.fixture
def tower(fleet: Settings) -> Iterator[Tower]:
    with Tower(fleet) as opened:
        yield opened


@pytest.fixture(scope="module")
def lasting_site(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The small fleet's worker, for all tests of a module."""
    with open_site(worker_settings(lasting, tmp_path_factory.mktemp("site"))) as opened:
        yield opened


@pytest.fixture
def site(lasting_site: Site) -> Iterator[Site]:
    """It without work, before and after a test."""
    yield lasting_site
    lasting_site.settle()


@pytest.fixture
def producer(fleet: Settings) -> Iterator[Celery]:
    with producing(fleet) as app:
        yield app
