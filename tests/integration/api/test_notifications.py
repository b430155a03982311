"""A waiter learns of a job's end although the announcement was lost: in a router and in the client, on Valkey."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis

from api.routing.results import Results
from router.service.store import RouterStore
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.client.valkey_results import Replies
from taxiway.client.valkey_transport import ValkeyLink
from taxiway.contract.keys import job_key, reply_channel, result_key
from taxiway.errors import BrokerUnavailableError
from tests.cable import Cable, cable_to

META = b'{"task_id": "j", "status": "SUCCESS"}'
PAUSE = 0.1
SOON = 20.0


@pytest.fixture
def name() -> str:
    """A unique name: channels are one namespace for all of a server's databases."""
    return uuid.uuid4().hex


@asynccontextmanager
async def router_results(url: str, name: str) -> AsyncIterator[Results]:
    store = RouterStore(url, Limits())
    results = Results(url, store.calls.calls, name, pause=PAUSE)
    listening = asyncio.create_task(results.run())
    try:
        yield results
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await results.close()
        await store.close()


@asynccontextmanager
async def client_replies(url: str, name: str) -> AsyncIterator[Replies]:
    link = ValkeyLink(url, 1.5)
    replies = Replies(link.connection(), link.calls, reply_channel(name), pause=PAUSE)
    try:
        yield replies
    finally:
        await replies.close()
        await link.close()


async def subscribed(store: redis.Redis, name: str, *, times: int = 1) -> None:
    """Returns once so many connections have subscribed to a reply channel."""
    async with asyncio.timeout(SOON):
        while store.pubsub_numsub(reply_channel(name))[0][1] < times:
            await asyncio.sleep(0.01)


async def test_a_router_finds_a_result_that_was_never_announced(
    settings: Settings, store: redis.Redis, name: str
) -> None:
    async with router_results(settings.broker, name) as results:
        await subscribed(store, name)
        expected = results.expect("j")
        store.hset(job_key("j"), "state", "queued")
        await asyncio.sleep(PAUSE)  # what was looked up at the start is over
        store.set(result_key("j"), META)
        assert await results.within(SOON, expected) == META


async def test_a_router_ends_the_wait_for_a_job_that_the_store_has_lost(
    settings: Settings, store: redis.Redis, name: str
) -> None:
    async with router_results(settings.broker, name) as results:
        await subscribed(store, name)
        store.hset(job_key("kept"), "state", "queued")
        lost, kept = results.expect("lost"), results.expect("kept")
        with pytest.raises(BrokerUnavailableError, match="lost job lost"):
            await results.within(SOON, lost)
        store.set(result_key("kept"), META.replace(b'"j"', b'"kept"'))
        assert b"kept" in await results.within(SOON, kept)


async def test_a_client_finds_a_result_that_was_never_announced(
    settings: Settings, store: redis.Redis, name: str
) -> None:
    async with client_replies(settings.broker, name) as replies:
        future = replies.expect("j")
        await subscribed(store, name)
        await asyncio.sleep(PAUSE)
        store.set(result_key("j"), META)
        assert await replies.wait(future, SOON) == META


def test_a_router_gives_up_a_subscription_that_has_become_silent(
    settings: Settings, store: redis.Redis, name: str
) -> None:
    async def scenario(cable: Cable, url: str) -> None:
        async with router_results(url, name) as results:
            await subscribed(store, name)
            waited_for = results.expect("j")
            cable.forget()
            await subscribed(store, name, times=2)  # the server knows nothing of the first one's end
            assert waited_for.answer is None

    with cable_to(settings.broker) as (cable, url):
        asyncio.run(scenario(cable, url))
