"""Who waits hears of an end that nobody announced to it: at a router and in the client, on a real Valkey server."""

import asyncio
import uuid
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import pytest
import redis

from broker.valkey.connection import connect
from router.service.results import Results
from router.service.store import Store
from tasks.topology import Limits
from taxiway.client.replies import Replies
from taxiway.client.valkey_link import ValkeyLink
from taxiway.contract.keys import reply_channel, result_key
from taxiway.valkey.wire import RespWire
from tests.cable import Cable

META = b'{"task_id": "j", "status": "SUCCESS"}'
PAUSE = 0.1
SOON = 20.0


@pytest.fixture
def store(settings):
    with redis.Redis.from_url(settings.state) as client:
        yield client


@pytest.fixture
def name():
    """Nobody else listens under it: channels are one namespace for all of a server's databases."""
    return uuid.uuid4().hex


@asynccontextmanager
async def router_results(url, name):
    store = Store(url, Limits())
    results = Results(url, store, name, pause=PAUSE)
    listening = asyncio.create_task(results.run())
    try:
        yield results
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await results.close()
        await store.close()


@asynccontextmanager
async def client_replies(url, name):
    link = ValkeyLink(url, 1.5)
    replies = Replies(link, reply_channel(name), pause=PAUSE)
    try:
        yield replies
    finally:
        await replies.close()
        await link.close()


async def subscribed(store, name, *, times=1):
    """Returns once so many connections have subscribed to a reply channel."""
    async with asyncio.timeout(SOON):
        while store.pubsub_numsub(reply_channel(name))[0][1] < times:
            await asyncio.sleep(0.01)


def test_a_router_finds_a_result_that_was_never_announced(settings, store, name):
    async def scenario():
        async with router_results(settings.state, name) as results:
            await subscribed(store, name)
            with results.expect("j") as future:
                await asyncio.sleep(PAUSE)  # what was looked up at the start is over
                store.set(result_key("j"), META)
                return await asyncio.wait_for(future, SOON)

    assert asyncio.run(scenario()) == META


def test_a_client_finds_a_result_that_was_never_announced(settings, store, name):
    async def scenario():
        async with client_replies(settings.state, name) as replies:
            future = replies.expect("j")
            await subscribed(store, name)
            await asyncio.sleep(PAUSE)
            store.set(result_key("j"), META)
            return await replies.wait(future, SOON)

    assert asyncio.run(scenario()) == META


def test_a_router_gives_up_a_subscription_that_has_become_silent(settings, store, name):
    parts = urlsplit(settings.state)
    cable = Cable(parts.hostname, parts.port)
    url = urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{cable.port}"))

    async def scenario():
        async with router_results(url, name):
            await subscribed(store, name)
            cable.forget()
            await subscribed(store, name, times=2)  # the server knows nothing of the first one's end

    try:
        asyncio.run(scenario())
    finally:
        cable.close()


def test_a_connection_that_ended_before_it_was_taken_over_is_told_lost():
    async def scenario():
        async def greet(reader, writer):
            while await reader.read(4096):  # AUTH, HELLO or what redis-py says else
                writer.write(b"+OK\r\n" * 2)
                writer.write_eof()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        opened = connect(f"redis://127.0.0.1:{port}/0?protocol=2").connection_pool.make_connection()
        await opened.connect()
        async with asyncio.timeout(SOON):
            while not opened._reader.at_eof():
                await asyncio.sleep(0)
        lost = asyncio.get_running_loop().create_future()
        wire = RespWire(opened, print, lost.set_result)
        try:
            return await asyncio.wait_for(lost, SOON)
        finally:
            wire.close()
            server.close()

    assert isinstance(asyncio.run(scenario()), redis.ConnectionError)
