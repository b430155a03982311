"""Real servers for the tests. A missing RabbitMQ skips on a laptop and fails in CI."""

import asyncio
import fcntl
import gc
import inspect
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from kombu import Connection
from xdist.scheduler import LoadFileScheduling

from local.embedded import EmbeddedValkey
from tasks.settings import Settings
from tests import tables
from tests.command_line import CommandLine
from tests.producing import QUORUM
from tests.working import empty_fleet

# Examples of each property: while working, in CI and at night (pytest --hypothesis-profile). No deadline: a busy
# machine is no failure, and pytest-timeout ends what hangs. Nor is a draw of many situations that have no placement:
# those tests leave them out on purpose.
for profile, examples in {"working": 20, "ci": 50, "nightly": 200}.items():
    hypothesis_settings.register_profile(
        profile,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
# A mutant of the product is to be found, not shown at its smallest.
hypothesis_settings.register_profile(
    "mutants", hypothesis_settings.get_profile("working"), phases=[Phase.explicit, Phase.generate], derandomize=True
)
hypothesis_settings.load_profile("ci" if os.environ.get("CI") else "working")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As a test's table has it."""
    tables.parametrize(metafunc)


# Collecting makes a million objects that stay: the garbage collector scanned them for half of the time, and with them
# whenever a test collects garbage.
gc.disable()

# A shell starts background jobs with SIGINT ignored, and a process that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function on an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in arguments}))
    return True


class FilesAndFleet(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """One process has all tests of a file, and one those of all files that use the acceptance tests' fleet."""

    def _split_scope(self, nodeid: str) -> str:
        path = Path(super()._split_scope(nodeid))
        shares = path.parent.name == "acceptance" and path.name != "test_rolling_upgrade.py"
        return "fleet" if shares else str(path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Who runs which tests; pytest-xdist's own groups (`--dist loadgroup`) have no effect with pytest 9.2."""
    return FilesAndFleet(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """From here on there is garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an embedded Valkey server that lives as long as the test run."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    """Settings of a fleet whose broker and state are one empty database, another for each test."""
    return empty_fleet(valkey_url)


@pytest.fixture(scope="session")
def amqp_url() -> str:
    """The address of a RabbitMQ server for tests, from TAXIWAY_TEST_AMQP."""
    url = os.environ.get("TAXIWAY_TEST_AMQP", "")
    if not url and os.environ.get("CI"):
        pytest.fail("TAXIWAY_TEST_AMQP is not set: in CI the RabbitMQ tests must run")
    if not url:
        pytest.skip("TAXIWAY_TEST_AMQP is not set: no RabbitMQ server to test with")
    return url


@pytest.fixture
def rabbit(amqp_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A RabbitMQ whose arrivals are an empty quorum queue, and which no other process tests with meanwhile."""
    with (tmp_path_factory.getbasetemp().parent / "rabbitmq").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Connection(amqp_url) as connection:
            queue = QUORUM.bind(connection.default_channel)
            queue.delete()
            queue.declare()
        yield amqp_url


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    """The command line in this process, in an empty folder and without a fleet's address."""
    monkeypatch.chdir(tmp_path)
    for name in ("TAXIWAY_URL", "TAXIWAY_DATA"):
        monkeypatch.delenv(name, raising=False)
    return CommandLine()
