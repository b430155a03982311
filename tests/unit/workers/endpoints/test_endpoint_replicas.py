"""Endpoints as their workers see them: their replicas, their probes and what they say of themselves."""

import asyncio
import socket
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.heartbeat import EngineLoad
from tasks.queues.endpoints import Endpoint, Health, Start
from tasks.queues.queues_file import followed
from tasks.topology import Topology, parse_topology
from tests.builders import recorded
from workers.device import DeviceMissingError, endpoint_device
from workers.endpoints import openai
from workers.endpoints.http import EndpointLink, OneAddress
from workers.endpoints.places import EndpointHealth, is_full, read_metrics, read_slots
from workers.endpoints.protocol import EndpointError, FaultKind

TEXT = recorded("documents/replicas.yaml")
TOPOLOGY = parse_topology(TEXT)
ONE = TOPOLOGY.hardware["engine"].endpoint
assert ONE is not None

urls = st.lists(st.sampled_from(["http://one/v1", "http://two/v1", "http://three/v1"]), min_size=1, unique=True)
endpoints = st.builds(
    Endpoint,
    protocol=st.sampled_from(["openai", "oip"]),
    url=urls.map(tuple),
    slots=st.integers(1, 64),
    models=st.just({"chat": "served"}),
    key_env=st.sampled_from([None, "KEY"]),
    headers=st.sampled_from([{}, {"X-Team": "lab"}]),
    addresses=st.sampled_from([None, 1, 3]),
)


def stated(endpoint: Endpoint, price: float) -> Topology:
    """The file with this endpoint, and another price."""
    engine = TOPOLOGY.hardware["engine"]
    changed = msgspec.structs.replace(
        engine,
        endpoint=endpoint,
        max_batch=endpoint.slots,
        price=msgspec.structs.replace(engine.price, usd_per_hour=price),
    )
    return msgspec.structs.replace(TOPOLOGY, hardware={**TOPOLOGY.hardware, "engine": changed})


@given(endpoint=endpoints, price=st.floats(0.1, 9))
def test_an_edit_changes_nothing_but_endpoints_of_the_same_protocol_and_key(endpoint: Endpoint, price: float) -> None:
    used = followed(TOPOLOGY, stated(endpoint, price))
    alike = (endpoint.protocol, endpoint.key_env) == ("openai", None)
    assert used.hardware["engine"].endpoint == (endpoint if alike else ONE)
    assert used.hardware["engine"].max_batch == (endpoint.slots if alike else 4)
    assert used.hardware["engine"].price == TOPOLOGY.hardware["engine"].price
    assert used.hardware["cpu.batch"] is TOPOLOGY.hardware["cpu.batch"]
    assert followed(used, TOPOLOGY) == TOPOLOGY


@given(endpoint=endpoints)
def test_each_replica_has_a_label_of_its_own_and_no_other_label_has_one(endpoint: Endpoint) -> None:
    devices = [endpoint_device(endpoint, f"endpoint:{index}") for index in range(len(endpoint.replicas))]
    assert len({device.address for device in devices}) == len(endpoint.urls) * (endpoint.addresses or 1)
    with pytest.raises(DeviceMissingError):
        endpoint_device(endpoint, f"endpoint:{len(devices)}")


def test_an_engine_on_a_free_port_is_reached_there_and_others_at_their_own() -> None:
    one: dict[str, Any] = {
        "protocol": "openai",
        "slots": 1,
        "models": {"chat": "served"},
        "start": Start(command="serve"),
    }
    free = Endpoint(url="http://127.0.0.1:0/v1", **one)
    assert endpoint_device(free, "endpoint:0", 8123).address == "http://127.0.0.1:8123/v1"
    assert endpoint_device(Endpoint(url="http://a:80/v1", **one), "endpoint:0", 8123).address == "http://a:80/v1"


def test_a_name_with_several_addresses_is_as_many_replicas() -> None:
    async def resolve(place: int) -> str:
        async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
            hosts = ("10.0.0.7", "10.0.0.5", "10.0.0.7", "10.0.0.6")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 80)) for host in hosts]

        asyncio.get_running_loop().getaddrinfo = getaddrinfo  # type: ignore[method-assign]  # the name server's answer
        (found,) = await OneAddress(place).resolve("vllm", 80)
        return found["host"]

    assert [asyncio.run(resolve(place)) for place in range(3)] == ["10.0.0.5", "10.0.0.6", "10.0.0.7"]
    with pytest.raises(OSError, match=r"the name has 3 address\(es\)"):
        asyncio.run(resolve(3))


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


@pytest.mark.cases("body, engine", [(recorded("documents/vllm.txt"), {"running": 5, "waiting": 4, "cache": 0.5})])
def test_an_engines_metrics_show_what_runs_and_waits_there(body: str, engine: dict[str, Any] | None) -> None:
    assert read_metrics(body.encode()) == (None if engine is None else EngineLoad(**engine))


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
