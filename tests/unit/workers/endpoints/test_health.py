"""When an endpoint's probes take it out of service, and bring it back."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.heartbeat import EngineLoad
from tasks.queues.endpoints import Endpoint, Health
from tests.builders import recorded
from workers.endpoints import openai
from workers.endpoints.health import EndpointHealth, is_full, read_metrics, read_slots
from workers.endpoints.http import EndpointLink
from workers.endpoints.protocol import EndpointError, FaultKind

FAILED = EndpointError(FaultKind.UNREACHED, "no answer")
LOADING = EndpointError(FaultKind.STARTING, "the endpoint is starting")
Outcome = bool | EndpointError


class Link:
    """A connection whose probes have these outcomes: whether each is answered, or how it failed."""

    root, url = "http://engine", "http://engine/v1"
    received = 0.0

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes: Iterator[Outcome] = iter(outcomes)
        self.over = asyncio.Event()

    async def probe(self, path: str, timeout: float, method: str = "GET", *, base: str = "") -> bytes:
        """The outcome; after the last one, nothing is answered."""
        if base == self.root:  # the engine has no figures
            raise FAILED
        answered = next(self._outcomes, None)
        if answered is None:
            self.over.set()
            await asyncio.Event().wait()
        if isinstance(answered, EndpointError):
            raise answered
        if not answered:
            raise FAILED
        return b'{"data": []}'


async def _state_after(outcomes: Sequence[Outcome]) -> str:
    link = Link(outcomes)
    endpoint = Endpoint(protocol="openai", url="http://engine/v1", slots=1, health=Health(every=0.01))
    health = EndpointHealth(cast("EndpointLink", link), openai, endpoint, lambda: None, lambda _: None)
    probing = asyncio.create_task(health.run())
    async with asyncio.timeout(10):
        await link.over.wait()
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    return health.state


@pytest.mark.cases("outcomes, state")
def test_two_missed_probes_open_the_breaker_or_one_of_starting(outcomes: Sequence[Outcome], state: str) -> None:
    assert asyncio.run(_state_after(outcomes)) == state


SLOTS = b'[{"id":0,"is_processing":true,"params":{}},{"id":1,"is_processing":false}]'


@pytest.mark.parametrize(
    ("body", "engine"),
    [
        (recorded("documents/vllm.txt"), EngineLoad(running=5, waiting=4, cache=0.5)),
        ("llamacpp:requests_processing 1\nllamacpp:requests_deferred 2\n", EngineLoad(running=1, waiting=2)),
        ('nv_inference_pending_request_count{model="a"} 7\n', EngineLoad(waiting=7)),
        *((nothing, None) for nothing in ("process_cpu_seconds_total 1\n", "vllm:num_requests_running{broken 1", "")),
        ("vllm:num_requests_running 1e300\nvllm:num_requests_waiting NaN\n", EngineLoad(running=10**6)),
        ("vllm:kv_cache_usage_perc -3\nvllm:num_requests_running -1\n", EngineLoad()),
    ],
)
def test_an_engines_metrics_show_what_runs_and_waits_there(body: str, engine: EngineLoad | None) -> None:
    assert read_metrics(body.encode()) == engine


@pytest.mark.parametrize(("body", "engine"), [(SLOTS, EngineLoad(running=1)), (b"{}", None), (b"\xff", None)])
def test_slots_show_what_runs(body: bytes, engine: EngineLoad | None) -> None:
    assert read_slots(body) == engine


@given(text=st.text(st.sampled_from('vllm:num_requests_running{}"=,\n 0123456789.eE+-#\\\xff')))
def test_whatever_an_endpoint_says_is_facts_or_nothing(text: str) -> None:
    for body in (text, f"vllm:num_requests_running{text}"):
        facts = read_metrics(body.encode())
        assert facts is None or 0 <= facts.running <= 10**6
    assert read_slots(text.encode()) is None or text.strip() == "[]"


def test_an_engine_whose_requests_wait_or_whose_cache_is_used_is_full() -> None:
    engines = (None, EngineLoad(running=9), EngineLoad(waiting=1), EngineLoad(cache=0.99))
    assert [is_full(one) for one in engines] == [False, False, True, True]
