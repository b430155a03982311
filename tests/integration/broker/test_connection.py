"""Our connections to a real Valkey server."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import redis
import uvloop

from router.service.store import RouterStore
from tasks.queues.limits import Limits
from tasks.settings import TREE, Settings
from taxiway import Client, TaxiwayError
from taxiway.connection import AsyncConnection, Connection, ConnectionPool
from taxiway.errors import BrokerUnavailableError
from taxiway.valkey import WRITE, ServerError, stored
from tests.cable import Cable, cable_to, through
from tests.waiting import BUSY, Blocking, in_thread

SOON = 60.0
VALUES = {f"large:{number}": bytes([number]) * size for number, size in enumerate((1, 2**16, 2**18 + 1, 2**21, 9))}


class Echo(NamedTuple):
    """A script that answers its arguments."""

    args: tuple[Any, ...]
    text: str = "return ARGV"

    @property
    def command(self) -> tuple[Any, ...]:
        return ("EVALSHA", "4cf2342858f27cba86b2b790280b0ba54885a7d0", 0, *self.args)


@pytest.fixture
def cable(settings: Settings) -> Iterator[Cable]:
    """The way to the server."""
    with cable_to(settings.broker) as (cable, _):
        yield cable


def kill(settings: Settings, name: str) -> None:
    """Have the server end the connections of this name."""
    with redis.Redis.from_url(settings.broker) as store:
        clients: list[dict[str, Any]] = store.client_list()
        for client in clients:
            if client["name"] == name:
                store.client_kill_filter(_id=client["id"])


@pytest.fixture(params=["asyncio", "blocking"])
def opened(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Callable[..., Any]]:
    """Opens connections to the server, as event loops or threads use them; each call is waited for."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, ExitStack() as stack:

        def open_connection(url: str = settings.broker, **options: Any) -> Any:
            blocking = request.param == "blocking"
            found = ConnectionPool(url, **options) if blocking else Blocking(runner, AsyncConnection(url, **options))
            stack.callback(found.close)
            return found

        yield open_connection


async def until(condition: Callable[[], bool]) -> None:
    """Return once it is so."""
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0)


def test_a_script_runs_also_where_the_server_forgot_it(opened: Callable[..., Any]) -> None:
    connection = opened()
    assert connection.run(Echo(("a", b"\x00", 7))) == [b"a", b"\x00", b"7"]
    connection.call("SCRIPT", "FLUSH")
    assert [connection.run(Echo(("b",))), connection.run(Echo(("c",)))] == [[b"b"], [b"c"]]


async def test_a_connection_that_the_server_closed_is_reopened(settings: Settings) -> None:
    connection = AsyncConnection(settings.broker)
    await connection.call("CLIENT", "SETNAME", "ended")
    kill(settings, "ended")
    await until(lambda: not connection.connected)
    answer: bytes = await connection.call("ECHO", "again")
    connection.close()
    assert answer == b"again"
    connections = ConnectionPool(settings.broker)
    connections.call("CLIENT", "SETNAME", "ended")
    kill(settings, "ended")
    assert connections.call("ECHO", "again") == b"again"
    connections.close()


def test_a_large_value_is_stored_by_small_commands_which_may_be_repeated_in_any_order(
    opened: Callable[..., Any],
) -> None:
    content, connection = os.urandom(2 * WRITE + 5), opened()
    commands = stored("large", content, 60)
    connection.calls(*commands, *reversed(commands))
    assert connection.call("GET", "large") == content
    assert 0 < connection.call("TTL", "large") <= 60
    assert max(len(part) for command in commands for part in command if isinstance(part, memoryview)) == WRITE


async def test_an_abandoned_call_leaves_the_others_their_answers(settings: Settings) -> None:
    connection = AsyncConnection(settings.broker)
    await connection.connect()
    given_up = asyncio.ensure_future(connection.call("ECHO", "first"))
    await asyncio.sleep(0)
    given_up.cancel()
    answer: bytes = await connection.call("ECHO", "second")
    connection.close()
    assert answer == b"second"


def test_a_missing_answer_is_an_error_and_the_next_call_is_answered(opened: Callable[..., Any]) -> None:
    connection = opened(server="broker", answer=1)
    with pytest.raises(BrokerUnavailableError, match="broker"):
        connection.call("BLPOP", "nothing", 30)
    assert connection.call("ECHO", "next") == b"next"


def test_a_server_is_not_blamed_for_the_time_for_which_the_event_loop_stood_still(settings: Settings) -> None:
    async def ask() -> object:
        connection = AsyncConnection(settings.broker, answer=1)
        await connection.connect()
        waiting = asyncio.ensure_future(connection.call("BLPOP", "nothing", 1.7))
        await asyncio.sleep(0)
        time.sleep(1.2)
        try:
            return await waiting
        finally:
            connection.close()

    assert uvloop.run(ask()) is None


async def test_what_blocks_ends_with_its_caller(settings: Settings) -> None:
    connection = AsyncConnection(settings.broker, answer=None)
    waiting = asyncio.ensure_future(connection.call("BLMOVE", "from", "to", "LEFT", "LEFT", 0))
    with redis.Redis.from_url(settings.broker) as store:
        await until(lambda: store.info("clients")["blocked_clients"] > 0)
        waiting.cancel()
        await until(lambda: not connection.connected)
        await until(lambda: store.info("clients")["blocked_clients"] == 0)


async def test_calls_on_a_connection_that_is_closed_fail_at_once(settings: Settings) -> None:
    connection = AsyncConnection(settings.broker, answer=None)
    waiting = asyncio.ensure_future(connection.call("BLPOP", "nothing", 0))
    await until(lambda: connection.connected)
    await asyncio.sleep(0)
    connection.close()
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(waiting, SOON)


async def test_a_call_whose_connection_is_closed_while_it_opens_fails_and_may_be_repeated(
    settings: Settings, cable: Cable
) -> None:
    connection = AsyncConnection(through(settings.broker, cable))
    cable.delay = 2 * SOON
    listening = asyncio.ensure_future(connection.listen([("SUBSCRIBE", "x")], lambda _: None))
    asking = asyncio.ensure_future(connection.call("PING"))
    await asyncio.sleep(0.01)  # it is connecting
    connection.close()
    for waiting in (listening, asking):
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(waiting, SOON)
    cable.delay = 0.0
    assert await connection.call("PING") == b"PONG"
    connection.close()


def test_large_values_go_and_come_whole_among_small_ones(opened: Callable[..., Any]) -> None:
    connection = opened()
    connection.calls(*(("SET", key, value) for key, value in VALUES.items()))
    found = connection.calls(*(("GET", key) for key in ("large:none", *VALUES, "large:none")))
    assert found == [None, *VALUES.values(), None]


def test_an_error_of_the_server_is_raised_and_the_next_call_is_answered(opened: Callable[..., Any]) -> None:
    connection = opened()
    with pytest.raises(ServerError, match="WRONGTYPE"):
        connection.calls(("LPUSH", "some:list", "x"), ("GET", "some:list"))
    assert connection.call("ECHO", "next") == b"next"


async def test_an_error_in_a_transaction_is_raised(settings: Settings) -> None:
    connection = AsyncConnection(settings.broker)
    assert await connection.transaction(("SET", "one", 1), ("GET", "one")) == [b"OK", b"1"]
    with pytest.raises(ServerError, match="WRONGTYPE"):
        await connection.transaction(("LPUSH", "one", 1), ("GET", "one"))
    connection.close()


async def test_all_calls_to_a_silent_server_fail_together(settings: Settings, cable: Cable) -> None:
    """Also those who come while another connects: no wait is added to another."""

    connection = AsyncConnection(through(settings.broker, cable), answer=1, connect_timeout=1)
    await connection.call("PING")
    cable.forget()
    began = time.monotonic()
    answer = await asyncio.gather(*(connection.call("PING") for _ in range(20)), return_exceptions=True)
    assert all(isinstance(one, TimeoutError) for one in answer), answer
    assert (time.monotonic() - began) < 2 + BUSY  # one after the other they would take twenty seconds


async def test_a_large_command_may_be_sent_for_longer_than_a_server_may_be_silent(
    settings: Settings, cable: Cable
) -> None:
    """A busy server that still reads has not failed."""

    connection = AsyncConnection(through(settings.broker, cable), answer=2)
    await connection.call("PING")
    cable.delay = 0.05  # each MiB at most
    began = time.monotonic()
    await connection.call("SET", "large", bytes(48 * 2**20))
    connection.close()
    assert (time.monotonic() - began) > 2


def test_a_subscription_receives_messages_or_nothing_within_its_timeout(settings: Settings) -> None:
    connection, other = Connection(settings.broker), ConnectionPool(settings.broker)
    assert connection.ask([("SUBSCRIBE", "heard")]) == [[b"subscribe", b"heard", 1]]
    assert connection.next_message(0.01) is None
    other.call("PUBLISH", "heard", "x")
    assert connection.next_message(SOON) == [b"message", b"heard", b"x"]
    connection.close()
    other.close()


def test_threads_share_connections(settings: Settings) -> None:
    connections = ConnectionPool(settings.broker)
    answers: dict[int, bytes] = {}

    def ask(number: int) -> None:
        for _ in range(50):
            answers[number] = connections.call("ECHO", str(number))

    with ExitStack() as stack:
        for number in range(8):
            stack.enter_context(in_thread(ask, number))
    connections.close()
    assert answers == {number: b"%d" % number for number in range(8)}


FORKED = """
import os, sys
from taxiway.connection import ConnectionPool
connections = ConnectionPool(sys.argv[1])
mine = connections.call("CLIENT", "ID")
child = os.fork()
if not child:
    os._exit(0 if connections.call("CLIENT", "ID") != mine else 1)
assert os.waitpid(child, 0)[1] == 0
assert connections.call("CLIENT", "ID") == mine
"""


def test_a_child_process_leaves_its_parents_connection_alone(settings: Settings) -> None:
    # In a process of its own: libraries that other tests have loaded warn of a fork.
    done = subprocess.run([sys.executable, "-c", FORKED, settings.broker], cwd=TREE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_comes_in_one_turn_of_the_loop_came_at_one_time(settings: Settings) -> None:
    async def scenario() -> tuple[float, float]:
        store = RouterStore(settings.broker, Limits())
        await store.fleet.facts()
        first, second = store.clock.stored_now(), store.clock.stored_now()
        while store.clock.stored_now() == first:
            await asyncio.sleep(0)
        await store.close()
        return first, second

    first, second = uvloop.run(asyncio.wait_for(scenario(), 60))
    assert first == second


def test_a_connection_whose_caller_gave_up_while_it_opened_is_closed_with_the_others(settings: Settings) -> None:
    async def scenario() -> bool:
        connection = AsyncConnection(settings.broker)
        asking = asyncio.create_task(connection.call("PING"))
        await asyncio.sleep(0)  # it is connecting
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(SOON):
            while not connection.connected:
                await asyncio.sleep(0.001)
        connection.close()
        return connection.connected

    assert not uvloop.run(scenario())


PASSWORD = "hush-hush"


@pytest.mark.parametrize("scheme", ["http", "https", "redis", "rediss", "amqp", "ftp"])
def test_a_client_shows_its_address_without_the_password(scheme: str) -> None:
    address = f"{scheme}://me:{PASSWORD}@127.0.0.1:9"
    with pytest.raises(TaxiwayError) as caught, Client(address, connect_timeout=0.1) as client:
        client.submit("echo", "a")

    assert PASSWORD not in str(caught.value)
