"""How fleet processes reach a real Valkey server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis
import uvloop

from broker.valkey import blocking
from broker.valkey.connection import Line, connect, fleet_errors, run
from broker.valkey.lua import Call
from router.service.store import Store
from tasks.settings import Settings
from tasks.topology import Limits
from taxiway.errors import BrokerUnavailableError
from taxiway.valkey.wire import RespWire


def ids(store: redis.Redis, name: str) -> list[str]:
    """The server's numbers of the connections of this name."""
    clients: list[dict[str, Any]] = store.client_list()
    return [client["id"] for client in clients if client["name"] == name]


def test_a_script_runs_also_where_the_server_forgot_it(settings: Settings) -> None:
    call = Call("peek", ["nothing", "\x00"], [2, 7])

    async def scenario() -> list[Any]:
        line, client = Line(settings.state), connect(settings.state)
        answers = []
        for asked in (line.run(call), run(client, call)):
            await line.call("SCRIPT", "FLUSH")
            answers.append(await asked)
        await line.close()
        await client.aclose()
        return answers

    assert asyncio.run(scenario()) == [[0, [], []]] * 2


async def _hung_up(line: Line) -> None:
    while line.connected:
        await asyncio.sleep(0)


def test_a_line_that_the_server_hung_up_on_is_opened_anew(settings: Settings) -> None:
    async def scenario() -> bytes:
        line = Line(settings.state)
        await line.call("CLIENT", "SETNAME", "hung-up")
        with redis.Redis.from_url(settings.state) as store:
            for number in ids(store, "hung-up"):
                store.client_kill_filter(_id=number)
        await asyncio.wait_for(_hung_up(line), 5)
        answer: bytes = await line.call("ECHO", "again")
        await line.close()
        return answer

    assert asyncio.run(scenario()) == b"again"


def test_calls_at_the_same_time_get_each_its_own_answer(settings: Settings) -> None:
    async def scenario() -> list[bytes]:
        line = Line(settings.state)
        answers: list[bytes] = await asyncio.gather(*(line.call("ECHO", str(n)) for n in range(20)))
        await line.close()
        return answers

    assert asyncio.run(scenario()) == [b"%d" % n for n in range(20)]


def test_an_answer_that_does_not_come_is_told_and_the_next_call_is_answered(settings: Settings) -> None:
    async def scenario() -> bytes:
        line = Line(settings.state, answer=0.2)
        with pytest.raises(BrokerUnavailableError), fleet_errors("broker"):
            await line.call("BLPOP", "nothing", 5)
        answer: bytes = await line.call("ECHO", "next")
        await line.close()
        return answer

    assert asyncio.run(scenario()) == b"next"


def test_who_waits_on_a_line_that_is_closed_is_told_at_once(settings: Settings) -> None:
    async def scenario() -> None:
        line = Line(settings.state, answer=None)
        waiting = asyncio.ensure_future(line.call("BLPOP", "nothing", 0))
        async with asyncio.timeout(20):
            while not line.connected:
                await asyncio.sleep(0)
            await line.close()
            with pytest.raises(redis.ConnectionError):
                await waiting

    asyncio.run(scenario())


def test_what_is_sent_on_a_connection_that_ended_goes_nowhere(settings: Settings) -> None:
    async def scenario() -> list[Any]:
        opened = connect(settings.state).connection_pool.make_connection()
        await opened.connect()
        told: list[Any] = []
        wire = RespWire(opened, told.append, told.append)
        wire.close()
        await asyncio.sleep(0)
        wire.send([("PING",)])
        return told

    assert uvloop.run(scenario()) == []


def test_large_values_go_and_come_whole_among_small_ones(settings: Settings) -> None:
    values = {f"large:{number}": bytes([number]) * size for number, size in enumerate((1, 2**16, 2**18 + 1, 2**21, 9))}

    async def scenario() -> list[Any]:
        line = Line(settings.state)
        await line.calls(*(("SET", key, value) for key, value in values.items()))
        found = await line.calls(*(("GET", key) for key in (*values, "large:none")))
        await line.close()
        return found

    assert uvloop.run(scenario()) == [*values.values(), None]
    assert blocking.Line(settings.state).values([*values, "large:none"]) == [*values.values(), None]


def test_who_asks_a_worker_for_a_value_of_another_kind_is_told_and_asks_on(settings: Settings) -> None:
    with redis.Redis.from_url(settings.state) as store:
        store.lpush("large:list", "x")
        store.set("large:small", "y")
    line = blocking.Line(settings.state)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        line.values(["large:list", "large:small"])
    assert line.values(["large:small"]) == [b"y"]


def test_what_comes_in_one_turn_of_the_loop_came_at_one_time(settings: Settings) -> None:
    async def scenario() -> tuple[float, float]:
        store = Store(settings.state, Limits())
        await store.facts()
        first, second = store.told_now(), store.told_now()
        while store.told_now() == first:
            await asyncio.sleep(0)
        await store.close()
        return first, second

    first, second = uvloop.run(asyncio.wait_for(scenario(), 10))
    assert first == second
