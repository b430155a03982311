"""How fleet processes reach a real Valkey server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis
import uvloop

from tasks.connection import Line, connect, told_plainly
from tasks.settings import Settings
from taxiway.client.resp_wire import RespWire
from taxiway.errors import BrokerUnavailableError

ECHO = "return ARGV"


def ids(store: redis.Redis, name: str) -> list[str]:
    """The server's numbers of the connections of this name."""
    clients: list[dict[str, Any]] = store.client_list()
    return [client["id"] for client in clients if client["name"] == name]


def test_a_script_runs_also_where_the_server_forgot_it(settings: Settings) -> None:
    async def scenario() -> list[Any]:
        line = Line(settings.state)
        first = await line.run(ECHO, [], ["a", b"\x00", 7])
        await line.call("SCRIPT FLUSH")
        second = await line.run(ECHO, [], ["b"])
        await line.close()
        return [*first, *second]

    assert asyncio.run(scenario()) == [b"a", b"\x00", b"7", b"b"]


async def _hung_up(line: Line) -> None:
    while not line.hung_up:
        await asyncio.sleep(0)


def test_a_line_that_the_server_hung_up_on_is_opened_anew(settings: Settings) -> None:
    async def scenario() -> bytes:
        line = Line(settings.state)
        await line.call("CLIENT SETNAME", "hung-up")
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
        with pytest.raises(BrokerUnavailableError), told_plainly("broker"):
            await line.call("BLPOP", "nothing", 5)
        answer: bytes = await line.call("ECHO", "next")
        await line.close()
        return answer

    assert asyncio.run(scenario()) == b"next"


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
