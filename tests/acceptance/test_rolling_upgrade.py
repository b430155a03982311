"""Routers and workers are replaced one after the other while requests flow, and no request fails."""

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from tasks.settings import Settings
from taxiway import AsyncClient
from taxiway.contract.keys import LEAD
from tests.cable import Balancer
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.working import WorkerProcess, worker_process, worker_settings

CALLERS = 4  # at each interface


class Traffic:
    """Callers at both interfaces, each of whom asks for the next answer when it has one."""

    def __init__(self, *urls: str) -> None:
        self.answers: dict[str, int] = dict.fromkeys(urls, 0)
        self.failures: list[BaseException] = []
        self._flowing = True

    async def flow(self) -> None:
        """Ask until `stop`."""
        await asyncio.gather(*map(self._callers, self.answers))

    def stop(self) -> None:
        """Let every caller have its answer, and end."""
        self._flowing = False

    async def _callers(self, url: str) -> None:
        async with AsyncClient(url) as client:
            await asyncio.gather(*(self._call(client, url, number) for number in range(CALLERS)))

    async def _call(self, client: AsyncClient, url: str, number: int) -> None:
        while self._flowing:
            value = f"{number} {self.answers[url]}"
            try:
                if number % 2:
                    answer = await client.infer("echo", value, deadline=30)
                else:
                    answer = await (await client.submit("echo", value, deadline=30)).result()
                assert answer.outputs["payload"] == value
            except Exception as error:
                self.failures.append(error)
            self.answers[url] += 1


class Crew:
    """Two routers and two workers, started together."""

    def __init__(self, settings: Settings, devices: tuple[str, str], stack: ExitStack) -> None:
        def router(_: int) -> RouterProcess:
            return stack.enter_context(router_process(settings, options=["--parting", "0.2"]))

        def worker(device: str) -> WorkerProcess:
            return stack.enter_context(worker_process(settings, "--device", device))

        with ThreadPoolExecutor() as starting:
            workers, routers = starting.map(worker, devices), starting.map(router, range(2))
        self.workers, self.routers = list(workers), list(routers)

    def ready(self) -> bool:
        """Whether its routers say so."""
        return all(HTTP.get(f"{one.http}/v2/health/ready").is_success for one in self.routers)

    def leave(self) -> Iterator[int]:
        """Tell one after the other to stop; the exit status of each."""
        for pair in zip(self.routers, self.workers, strict=True):
            for one in pair:
                one.process.send_signal(signal.SIGTERM)
                yield one.process.wait(120)


@pytest.fixture
def small(settings: Settings, tmp_path: Path) -> Settings:
    return worker_settings(settings, tmp_path)


@pytest.mark.slow
def test_no_request_fails_while_every_router_and_worker_is_replaced(small: Settings) -> None:
    with ExitStack() as stack, redis.Redis.from_url(small.broker) as state:
        old = Crew(small, ("cpu:0", "cpu:1"), stack)
        eventually(old.ready)
        balancer = Balancer(*(router.http for router in old.routers))
        stack.callback(balancer.close)
        traffic = Traffic(small.broker, balancer.url)
        flowing = stack.enter_context(ThreadPoolExecutor()).submit(asyncio.run, traffic.flow())
        stack.callback(traffic.stop)
        new = Crew(small, ("cpu:2", "cpu:3"), stack)
        eventually(new.ready)
        balancer.add(*(router.http for router in new.routers))
        assert list(old.leave()) == [0] * 4
        before = dict(traffic.answers)
        eventually(lambda: all(traffic.answers[url] > before[url] + 50 for url in before))
        traffic.stop()
        flowing.result(120)
        assert traffic.failures == []
        assert list(new.leave()) == [0] * 4
        assert state.exists(LEAD) == 0
        assert state.keys("taxiway:in-flight:*") == []
