"""The election of the router that leads, on a real Valkey server."""

import asyncio
from contextlib import AsyncExitStack

import redis
from msgspec.structs import replace

from broker.port import MoveStep, Peeked
from broker.valkey import run
from broker.valkey.forwarding import draw_answer, draw_call
from broker.valkey.mover import move_call
from broker.valkey.processes import Leadership
from router.upkeep.leader import Duty, Leader
from tasks.settings import Settings
from taxiway.contract.keys import LEAD, job_key, priority_list
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError
from tests.scripting import Store, placed

LEASE, TICK = 3.0, 0.1
EMPTY = Envelope(body="", headers={}, properties={})


class Counted(Duty):
    """Counts its ticks; every second one finds the broker away."""

    def __init__(self) -> None:
        super().__init__(0.01)
        self.ticks = self.elections = 0

    def begin(self) -> None:
        self.elections += 1
        super().begin()

    async def tick(self) -> None:
        self.ticks += 1
        if self.ticks % 2:
            raise BrokerUnavailableError("away", retry_after=1.0)


async def test_one_leads_until_it_resigns_or_its_lease_ends_and_no_token_comes_twice(settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        first, second = (Leadership(settings.broker, name, LEASE) for name in ("a", "b"))
        stack.push_async_callback(first.close)
        stack.push_async_callback(second.close)
        token = await first.campaign()
        assert (token, first.token) == ("a#1", "a#1")
        assert (await second.campaign(), second.token) == ("", "")
        assert await first.campaign() == token
        await first.resign()
        assert (first.token, await second.campaign()) == ("", "b#2")
        await asyncio.sleep(LEASE + 0.05)
        assert second.token == ""
        assert await second.campaign() == "b#3"


async def test_nothing_is_moved_or_drawn_under_a_token_that_is_superseded(settings: Settings) -> None:
    first, second = (Leadership(settings.broker, name, 30) for name in ("a", "b"))
    old = await first.campaign()
    await first.resign()
    token = await second.campaign()
    with redis.Redis.from_url(settings.broker) as client:
        store = Store(client)
        store.forward(placed("j", b"m"), placed("h", b"h", state="held", holding="q", deadline_at="0", accepted="1"))
        step = MoveStep(Peeked("cpu.batch", 0, b"m", replace(EMPTY, headers={"id": "j"})), "gpu.realtime", EMPTY)
        move = move_call(old, [step], [b"n"])
        assert run(client, move) == []
        assert draw_answer(run(client, draw_call(old, "q", 10, 5.0)))[1] == []
        assert run(client, move._replace(args=[token, *move.args[1:]])) == [1]
        assert [one.message for one in draw_answer(run(client, draw_call(token, "q", 10, 5.0)))[1]] == [b"h"]
    await first.close()
    await second.close()


async def test_a_job_that_lost_its_worker_stays_in_front_when_it_moves(settings: Settings) -> None:
    lead = Leadership(settings.broker, "a", 30)
    token = await lead.campaign()
    with redis.Redis.from_url(settings.broker) as client:
        Store(client).forward(placed("waiting", b"waiting"), placed("ran", b"ran"), placed("later", b"later"))
        client.rename(priority_list("cpu.batch", 0), "aside")
        client.lmove("aside", priority_list("gpu.realtime", 0), "RIGHT", "LEFT")
        client.rename("aside", priority_list("cpu.batch", 0))
        client.hset(job_key("ran"), "attempts", 1)
        moving = ("later", "ran")
        peeked = [Peeked("cpu.batch", 0, name.encode(), replace(EMPTY, headers={"id": name})) for name in moving]
        steps = [MoveStep(one, "gpu.realtime", EMPTY) for one in peeked]
        assert run(client, move_call(str(token), steps, [name.encode() for name in moving])) == [1, 1]
        assert client.lrange(priority_list("gpu.realtime", 0), 0, -1) == [b"later", b"waiting", b"ran"]
    await lead.close()


async def test_duties_are_done_by_the_leader_alone_and_by_the_next_one_when_it_leaves(settings: Settings) -> None:
    duties = Counted(), Counted()
    candidates = [Leadership(settings.broker, name, LEASE) for name in "ab"]
    leaders = [Leader(one, [duty], TICK) for one, duty in zip(candidates, duties, strict=True)]
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for leader in leaders:
            group.create_task(leader.run())
        while not any(duty.ticks > 3 for duty in duties):
            await asyncio.sleep(0.01)
        leads = 0 if duties[0].ticks else 1
        assert duties[1 - leads].ticks == 0
        assert duties[leads].elections == 1
        leaders[leads].leave()
        while duties[1 - leads].ticks < 3:
            await asyncio.sleep(0.01)
        leaders[1 - leads].leave()
    with redis.Redis.from_url(settings.broker) as client:
        assert client.get(LEAD) is None
    for one in candidates:
        await one.close()
